"""A run: what it writes, what it changes, resume to the bit, several processes, refusals."""

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from em_data.batch import Batch
from em_stable_diffusion import PRESETS, EMLoRAPipeline, LoRAConfig, lora_loop, train, train_lora
from em_stable_diffusion.base_source import find_base
from em_stable_diffusion.bases import open_base
from em_stable_diffusion.em_prompts import EMPrompts
from em_stable_diffusion.prompts import draw_rows, make_texts
from em_training import (
    Latents,
    config_from_json,
    config_to_json,
    list_checkpoints,
    load_checkpoint,
    read_best,
    read_stats,
)
from em_training.weights import hide_loading_bars
from support.commands import TORCHRUN
from support.config import refuses_config
from support.tiny_bases import MAKERS, make_stable_diffusion

CLASSES = "synthetic-materials"


def read_state(run):
    return load_checkpoint(list_checkpoints(run / "lora" / "checkpoints")[-1])["state"]


def flatten(tree, name=""):
    if isinstance(tree, dict):
        tree = tree.items()
    elif isinstance(tree, list | tuple):
        tree = enumerate(tree)
    else:
        return {name: tree}
    return {k: v for key, value in tree for k, v in flatten(value, f"{name}/{key}").items()}


@pytest.mark.parametrize("kind", MAKERS)
def test_run_folder(runs, make_config, kind):
    out = runs[kind]
    run = json.loads((out / "run.json").read_text())
    assert run["family"] == kind
    assert run["num_images_seen"] == 32
    assert run["train_seconds"] == sum(run["train_seconds_by_stage"].values())
    assert run["adapter_weights"] == {"of": "the last step"}
    started = run["started_from"]["base"]
    assert started["model"] == kind
    assert started["use"] == "tuned by LoRA"
    assert started["license"] in ("creativeml-openrail-m", "apache-2.0")
    written = config_from_json(LoRAConfig, (out / "config.json").read_text())
    assert written == make_config(out, kind)
    assert len(list((out / "lora" / "samples").glob("*.png"))) == 1
    lines = read_stats(out / "lora")
    assert [line["num_images_seen"] for line in lines] == [8, 16, 24, 32]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {"held_out_loss", "held_out_loss_q1", "held_out_loss_q4", "colourfulness"} <= {
        *lines[-1]
    }


@pytest.mark.parametrize("kind", MAKERS)
def test_the_loss_falls(runs, kind):
    """That of held-out tiles, whose noise is the same each time."""
    losses = [line["held_out_loss"] for line in read_stats(runs[kind] / "lora")[1::2]]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", MAKERS)
def test_only_the_adapted_weights_have_changed(runs, base_folders, kind):
    base = open_base(find_base(str(base_folders[kind])))
    pipeline = EMLoRAPipeline.from_pretrained(runs[kind] / "pipeline")
    adapted = {f"{name}.weight" for name in pipeline.adapters.config.layers}
    before, after = base.load_denoiser().state_dict(), pipeline.denoiser.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == adapted
    for name, value in base.load_vae().state_dict().items():
        assert torch.equal(value, pipeline.vae.state_dict()[name])
    trained = pipeline.adapters.state_dict()
    for name, value in read_state(runs[kind])["ema"].items():
        assert torch.equal(value, trained[name])


@pytest.mark.parametrize("steps_lost", [0, 1])
def test_resumed_run_equals_the_whole_run_to_the_bit(
    runs, make_config, tmp_path, monkeypatch, steps_lost
):
    """Stopped dead at the checkpoint, or a step past it; then the same command again.

    Without the text encoder, which the second start does not need.
    """

    class Killed(BaseException):
        pass

    class MortalRun(lora_loop.TrainingRun):
        def step(self, num_images_seen):
            super().step(num_images_seen)
            if num_images_seen == 16 + 4 * steps_lost:
                raise Killed

    base = tmp_path / "base"
    shutil.copytree(
        json.loads((runs["stable-diffusion"] / "config.json").read_text())["base"], base
    )
    config = replace(make_config(tmp_path / "resumed"), base=str(base))
    with monkeypatch.context() as patch:
        patch.setattr(lora_loop, "TrainingRun", MortalRun)
        with pytest.raises(Killed):
            train_lora(config)
    shutil.rmtree(base / "text_encoder")
    shutil.rmtree(base / "tokenizer")
    out = train_lora(config)
    whole, resumed = (flatten(read_state(each)) for each in (runs["stable-diffusion"], out))
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        is_tensor = isinstance(value, torch.Tensor)
        assert torch.equal(value, resumed[key]) if is_tensor else value == resumed[key], key
    ignored = ("train_seconds", "images_per_second")
    lines = [
        [{k: v for k, v in line.items() if k not in ignored} for line in read_stats(each / "lora")]
        for each in (runs["stable-diffusion"], out)
    ]
    assert lines[0] == lines[1]


def test_parts_and_recomputed_activations_change_nothing(runs, make_config, tmp_path):
    config = make_config(
        tmp_path, gradient_checkpointing=True, micro_batch_size=2, num_images=8, sample_every=0
    )
    first = read_stats(train_lora(config) / "lora")[0]
    whole = read_stats(runs["stable-diffusion"] / "lora")[0]
    assert first["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert first["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-4)


def test_a_finished_run_is_not_trained_again(runs, make_config, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(train, "train_adapters", refuse)
    out = runs["stable-diffusion"]
    assert train_lora(make_config(out)) == out
    assert "is already complete" in capsys.readouterr().out


@pytest.mark.parametrize("shows_downloads", [True, False])
def test_only_our_line_says_that_a_base_is_loaded(
    make_config, tmp_path, capfd, monkeypatch, shows_downloads
):
    """And the bars of the libraries are as before."""
    bars = huggingface_hub.utils
    monkeypatch.setattr("em_stable_diffusion.bases.hide_loading_bars", hide_and_compare)
    (bars.enable_progress_bars if shows_downloads else bars.disable_progress_bars)()
    try:
        train_lora(make_config(tmp_path / "run", "flux2-klein", num_images=4))
        shown = capfd.readouterr()
        assert bars.are_progress_bars_disabled() == (not shows_downloads)
    finally:
        bars.enable_progress_bars()
    assert "Loading" not in shown.err
    assert shown.out.count("base: FLUX.2 [klein], loaded from ") == 1
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert diffusers.utils.logging.is_progress_bar_enabled()


@contextmanager
def hide_and_compare():
    """Hide the bars of loading; those of downloads are as they were."""
    before = huggingface_hub.utils.are_progress_bars_disabled()
    with hide_loading_bars():
        assert huggingface_hub.utils.are_progress_bars_disabled() == before
        yield


def test_another_base_is_refused(runs, make_config, tmp_path):
    """One with another name, and one of the same name with other weights."""
    out = tmp_path / "run"
    shutil.copytree(runs["stable-diffusion"], out)
    (out / "run.json").unlink()
    other = make_stable_diffusion(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="base was"):
        train_lora(replace(make_config(out), base=str(other)))
    config = json.loads((out / "config.json").read_text()) | {"base": str(other)}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="began with: it has other weights"):
        train_lora(replace(make_config(out), base=str(other)))


def test_one_prompt_a_class(make_config, tmp_path):
    config = replace(
        make_config(tmp_path, num_images=8, sample_every=8),
        data=CLASSES,
        prompt="a micrograph of {class}",
    )
    config = replace(config, tiles=replace(config.tiles, num_synthetic=6))
    pipeline = EMLoRAPipeline.from_pretrained(train_lora(config) / "pipeline")
    names = list(pipeline.labels)
    assert len(names) == pipeline.num_classes == 3
    assert pipeline.prompts.config.texts == [f"a micrograph of {name}" for name in names]
    pipeline.set_progress_bar_config(disable=True)

    def draw(labels):
        rngs = [torch.Generator().manual_seed(0) for _ in range(3)]
        count = None if isinstance(labels, list) else 3
        return pipeline(count, generator=rngs, class_labels=labels, output_type="pt").images

    by_name = draw(names)
    assert torch.equal(by_name, draw([0, 1, 2]))
    assert (by_name[0] - by_name[1]).abs().max() > 1e-5
    torch.testing.assert_close(draw(names[1])[0], by_name[1], rtol=1e-4, atol=1e-5)
    empty = draw(None)
    torch.testing.assert_close(empty[0], empty[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'gold' is no class of this model; choose from"):
        draw("gold")
    with pytest.raises(ValueError, match="give numbers from 0 to 2"):
        draw([0, 3, 1])


def test_the_rows_of_prompts_are_those_of_the_classes():
    latents = Latents([[0]] * 5, [0], [1], ("a", "b"), [0, 1, -1, 1, 0])
    rng = torch.Generator().manual_seed(0)
    assert draw_rows(latents, range(5), 0.0, rng).tolist() == [1, 2, 0, 2, 1]
    assert draw_rows(latents, range(5), 1.0, rng).tolist() == [0] * 5
    plain = Latents([[0]] * 4000, [0], [1])
    rows = draw_rows(plain, range(4000), 0.1, rng)
    assert set(rows.tolist()) == {0, 1}
    assert abs(float((rows == 0).float().mean()) - 0.1) < 4 * (0.09 / 4000) ** 0.5


def test_a_prompt_with_classes_needs_classes(make_config):
    config = replace(make_config("x"), prompt="a {class}")
    assert make_texts(config, ("b", "c")) == ["a b", "a c"]
    with pytest.raises(ValueError, match=r"prompt is 'a \{class\}', but no micrograph of synthet"):
        make_texts(config, ())


def test_the_best_adapters_are_kept(make_config, tmp_path):
    lengths = {"evaluate_every": 8, "num_evaluation_images": 4, "num_evaluation_steps": 1}
    config = make_config(tmp_path, num_images=16, checkpoint_every=8, sample_every=0, **lengths)
    out = train_lora(config)
    best = read_best(out / "lora")
    distances = [line["held_out_frechet_distance"] for line in read_stats(out / "lora")]
    assert best["frechet_distance"] == min(distances)
    assert json.loads((out / "run.json").read_text())["adapter_weights"]["of"].startswith(
        "the best"
    )
    pipeline = EMLoRAPipeline.from_pretrained(out / "pipeline")
    folder = out / "lora" / "checkpoints" / f"{best['num_images_seen']:012d}"
    for name, value in load_checkpoint(folder)["state"]["ema"].items():
        assert torch.equal(value, pipeline.adapters.state_dict()[name])
    assert pipeline.adapters.config.colourfulness is None  # no samples were drawn


@pytest.fixture
def _new_accelerator():
    """Another number format needs another Accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_new_accelerator")
@pytest.mark.parametrize("kind", MAKERS)
def test_a_base_in_half_precision(make_config, tmp_path, kind):
    config = make_config(tmp_path, kind, num_images=8, num_sample_steps=1, sample_every=8)
    out = train_lora(replace(config, precision="bf16"))
    assert {each.dtype for each in read_state(out)["adapters"].values()} == {torch.float32}
    (line,) = read_stats(out / "lora")
    assert math.isfinite(line["held_out_loss"])


def test_prompts_are_encoded_once(runs, monkeypatch):
    prompts = EMPrompts.from_pretrained(runs["flux2-klein"] / "prompts")
    assert prompts.config.texts == ["an electron micrograph"]
    saved = EMPrompts.from_pretrained(runs["flux2-klein"] / "pipeline" / "prompts")
    assert torch.equal(prompts.embeddings, saved.embeddings)
    assert not (runs["flux2-klein"] / "pipeline" / "text_encoder").exists()


def test_impossible_configurations_are_refused(make_config, tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(ValueError, match="resolution is 36, but must be a multiple of 8 for this"):
        train_lora(replace(config, tiles=replace(config.tiles, resolution=36)))
    with pytest.raises(ValueError, match=r"lora\.targets has 'to_x', but no linear layer"):
        train_lora(replace(config, lora=replace(config.lora, targets=("to_q", "to_x"))))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with refuses_config(r"lora\.rank is 0, but must be greater than 0"):
        replace(config.lora, rank=0)
    with refuses_config(r"training\.prompt_dropout is 2, but must be at most 1"):
        replace(config.training, prompt_dropout=2)


def test_training_without_peft_says_how_to_install_it(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'em-synthesis\[lora\]'"):
        train_lora(make_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = PRESETS[name]()
    assert config_from_json(LoRAConfig, config_to_json(config)) == config
    assert config.tiles.symmetries == "d4"
    assert "stable-diffusion-2" not in config.base  # withdrawn


def join_processes(draw_batches):
    """Let one process have the batches of two: the noise of a view depends on its process."""

    def draw(latents, sampler, base, config, accelerator, num_images_seen):
        places = [SimpleNamespace(process_index=rank, num_processes=2) for rank in range(2)]
        halves = [
            draw_batches(latents, sampler, base, config, place, num_images_seen) for place in places
        ]
        for pair in zip(*halves):
            named = zip(*(vars(half).items() for half in pair))
            yield Batch(
                **{
                    name: torch.cat([value, other]) if torch.is_tensor(value) else value
                    for (name, value), (_, other) in named
                }
            )

    return draw


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_two_processes_share_the_work(make_config, tmp_path, monkeypatch, kind):
    """Both end with the same weights, to the bit (two_processes.py), and with those of one process
    that trains on both batches at once, up to rounding.
    """
    config = make_config(tmp_path / "run", kind, sample_every=0)
    (tmp_path / "config.json").write_text(config_to_json(config))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("two_processes.py")
    result = subprocess.run(
        [*TORCHRUN, str(script), str(tmp_path / "config.json")],
        cwd=Path(__file__).parents[2],
        env=environment | {"PYTHONPATH": os.pathsep.join(["tests", "."])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    monkeypatch.setattr(lora_loop, "draw_batches", join_processes(lora_loop.draw_batches))
    runs = tmp_path / "run", train_lora(replace(config, out=str(tmp_path / "alone")))
    for name in ("adapters", "ema"):
        together, alone = (read_state(run)[name] for run in runs)
        second = [key for key in alone if key.endswith("lora_B.weight")]  # these begin as 0
        apart = sum((together[key] - alone[key]).square().sum() for key in second).sqrt()
        moved = sum(alone[key].square().sum() for key in second).sqrt()
        assert apart < 1e-3 * moved
    together, alone = (read_stats(run / "lora") for run in runs)
    assert [line["num_images_seen"] for line in together] == [8, 16, 24, 32]
    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert together[-1]["held_out_loss"] == pytest.approx(alone[-1]["held_out_loss"], rel=1e-4)
