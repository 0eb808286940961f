"""Train, publish, load as a stranger and as an owner, push again: all families, over a real
connection.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import constants

import em_diffusion
import em_stylegan
from em_diffusion import EMLatentDiffusionPipeline, EMMaskLatentDiffusionPipeline, train_ldm
from em_diffusion.choose_guidance import load_run, store
from em_evaluation.wording import find_metric
from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_hub.publish import PublishConfig, publish_run
from em_stylegan import EMStyleGANPipeline, train_gan
from support import hub_server
from support.hub_server import make_environment
from support.models import draw

pytestmark = pytest.mark.slow  # two trainings, an evaluation and a second interpreter
CLASSES = {
    "em-ldm": EMLatentDiffusionPipeline,
    "em-gan": EMStyleGANPipeline,
    "em-masks-1.5": EMMaskLatentDiffusionPipeline,  # a name with a dot, as versions have
}
JUDGED = ("em-ldm", "em-gan")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(server, runs by repository, commits by repository): one tiny run of each family, trained,
    judged and published. The latent diffusion model is guided.
    """
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    runs = {name: folder / name for name in CLASSES}
    train_ldm(replace(em_diffusion.PRESETS["test"](), out=str(runs["em-ldm"])))
    store(*load_run(runs["em-ldm"]), (2.0, 0.0, 0.8), runs["em-ldm"])
    train_gan(replace(em_stylegan.PRESETS["test"](), out=str(runs["em-gan"])))
    train_with_masks(runs["em-ldm"], runs["em-masks-1.5"])
    evaluate_runs(
        EvaluationConfig(
            models=tuple(str(runs[name]) for name in JUDGED),
            out=str(folder / "judged"),
            num_images=16,
        )
    )
    with hub_server.HubServer() as server, patch.context() as machine:
        machine.setattr(constants, "ENDPOINT", server.url)
        machine.setattr(constants, "HF_HUB_DISABLE_XET", True)
        commits = {}
        for name, run in runs.items():
            config = PublishConfig(str(run), f"you/{name}", token="write-token", num_samples=4)
            judged = str(folder / "judged") if name in JUDGED else None
            publish_run(replace(config, evaluation=judged, license="apache-2.0"))
            commits[name] = server.repos["models", f"you/{name}"].branches["main"]
        yield server, runs, commits
    patch.undo()


def train_with_masks(source, out):
    """Train the latent diffusion model of `source` further, with masks."""
    config = em_diffusion.PRESETS["test"]()
    autoencoder = replace(config.autoencoder, num_images=0)
    denoiser = replace(config.denoiser, mask_conditional=True)
    train_ldm(
        replace(
            config,
            out=str(out),
            init_from=str(source),
            autoencoder=autoencoder,
            denoiser=denoiser,
        )
    )


@pytest.fixture(scope="module")
def strangers_images(published, tmp_path_factory):
    """What a stranger drew, {repository: {how it was loaded: images}}, in an interpreter that does
    not find our packages.
    """
    server, runs, commits = published
    home = tmp_path_factory.mktemp("stranger")
    # -S and a path of the site-packages alone: an editable install of our packages stays out of
    # sight
    packages = [path for path in sys.path if path.endswith("site-packages")]
    program = (
        f"import sys, runpy; sys.path += {packages!r}; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0])"
    )
    script = Path(__file__).with_name("stranger.py")
    names = [f"you/{name}@{commit}" for name, commit in commits.items()]
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(script), str(home), *names],
        cwd=home,
        env=make_environment(server, home / "hf", HF_TOKEN="write-token"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: np.load(home / f"{name}.npz") for name in runs}


@pytest.mark.parametrize("name", CLASSES)
def test_a_stranger_draws_the_owners_images(published, strangers_images, name):
    _, runs, _ = published
    own = CLASSES[name].from_pretrained(runs[name] / "pipeline")
    own.set_progress_bar_config(disable=True)
    expected = draw(own, 0, 1)
    for how in ("main", "pinned", "again"):
        np.testing.assert_allclose(strangers_images[name][how], expected, atol=1e-6)
    assert strangers_images[name]["narrow"].shape == expected.shape
    if name == "em-ldm":  # guided as it was published
        assert np.abs(draw(own, 0, 1, guidance_scale=1) - expected).max() > 0.01


@pytest.mark.parametrize("name", CLASSES)
def test_an_owner_loads_what_the_stranger_pushed_again_without_trust(
    published, strangers_images, name, hub_machine
):
    server, _, commits = published
    hub_machine(server, token=None)
    for source, revision in ((f"you/{name}-again", None), (f"you/{name}", commits[name])):
        loaded = CLASSES[name].from_pretrained(source, revision=revision)
        loaded.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(draw(loaded, 0, 1), strangers_images[name]["main"], atol=1e-6)
        for part in (loaded, *loaded.components.values()):
            assert not type(part).__module__.startswith("diffusers_modules")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(f"you/{name}")
    loaded.push_to_hub(f"you/{name}-private", private=True, token="write-token")
    assert server.repos["models", f"you/{name}-private"].private
    again = CLASSES[name].from_pretrained(f"you/{name}-private", token="write-token")
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(again, 3), draw(loaded, 3))


@pytest.mark.parametrize("name", JUDGED)
def test_the_card_has_the_evaluations_numbers(published, name):
    server, runs, _ = published
    report = json.loads((runs[name].parent / "judged" / "report.json").read_text())
    card = server.read(f"you/{name}", "README.md").decode()
    own, other = [model["name"] for model in report["models"]][:: 1 if name == "em-ldm" else -1]
    for key in ("frechet_distance", "kernel_distance"):
        metric = find_metric(report, own, key)
        assert f"value: {metric['value']}" in card
        assert f"low: {metric['low']}" in card
        assert f"value: {find_metric(report, other, key)['value']}" not in card
    record = json.loads(server.read(f"you/{name}", "run.json"))
    assert record["config"]["data"] == "synthetic"
    assert str(runs[name].parent) not in card + json.dumps(record)
