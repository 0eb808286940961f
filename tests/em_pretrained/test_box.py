"""Names of models in the package: what they mean, and that every command knows them."""

import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import em_pretrained
from em_commands import generate as generate_command
from em_data import read_image_folder
from em_diffusion import EMLatentDiffusionPipeline
from em_diffusion.load_autoencoder import load_autoencoder
from em_generation.candidates import name_candidates
from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import load_pipeline, read_model
from em_hub.publish import PublishConfig, publish_run
from em_stylegan.pictures import styles
from support.box import MODELS, write_box
from support.models import MAKERS, draw

ROOT = Path(__file__).parents[2]
MAX_MEGABYTES = 25
ABSENT = [name for name in em_pretrained.NAMES if name not in em_pretrained.list_models()]


@pytest.fixture
def box(tmp_path, monkeypatch):
    """Folders of stand-ins, by name; the working folder is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return write_box(tmp_path / "box", monkeypatch)


def test_a_name_is_a_folder_of_the_package(box):
    assert em_pretrained.list_models() == list(em_pretrained.NAMES) == list(MODELS)
    for name, folder in box.items():
        assert em_pretrained.find(name) == em_pretrained.path(name) == folder
        model = read_model(name)
        assert (model.source, model.name, model.folder) == (name, name, None)
        assert model.pipeline_folder == folder
        assert model.config["data"] == "synthetic-varied"
        assert em_pretrained.read_license(folder) == "apache-2.0"
    assert em_pretrained.find("you/em-ldm-64") is None


def test_a_local_path_wins(box, tmp_path):
    MAKERS["stylegan"]().save_pretrained("em-ldm-64")
    assert em_pretrained.find("em-ldm-64") is None
    assert read_model("em-ldm-64").kind == "stylegan2"


@pytest.mark.parametrize("wrong", ["em-ldm-46", "em_ldm_64", "em-stylegan-64"])
def test_a_typo_is_answered_with_the_names(box, wrong):
    said = r"not a Hub id.* Did you mean em-\w+-64\? Models in the package: em-ldm-64, em-styleg"
    with pytest.raises(ValueError, match=said):
        read_model(wrong)
    with pytest.raises(ValueError, match=said):
        load_autoencoder(wrong)
    with pytest.raises(ValueError, match=r"Did you mean em-"):
        styles.load_pipeline(wrong)
    with pytest.raises(ValueError, match=r"holds no model em.* Did you mean em-"):
        em_pretrained.path(wrong)
    assert em_pretrained.suggest("runs/em-ldm") == ""


def test_an_absent_model_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("em_pretrained.box.FOLDER", tmp_path)
    said = "This version of the package does not hold em-ldm-64. The package holds no model."
    for call in (read_model, load_autoencoder, em_pretrained.path, em_pretrained.find):
        with pytest.raises(ValueError, match=said):
            call("em-ldm-64")


def test_half_precision_is_computed_in_float32(box):
    """The codes keep all their digits, and nothing but the digits of the others is lost."""
    for name, family in MODELS.items():
        files = {path: load_file(path) for path in box[name].rglob("*.safetensors")}
        halves = [t for tensors in files.values() for t in tensors.values() if t.dtype.itemsize < 4]
        assert {tensor.dtype for tensor in halves} == {torch.float16}
        assert not list(box[name].rglob("*.py"))
        loaded, original = load_pipeline(name), MAKERS[family]()
        stock = type(original).from_pretrained(em_pretrained.path(name))
        for pipeline in (loaded, stock):
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    assert {p.dtype for p in part.parameters()} <= {torch.float32}
        assert np.array_equal(draw(loaded, 0, 1), draw(stock, 0, 1))
        assert np.abs(draw(loaded, 0, 1) - draw(original, 0, 1)).max() < 0.02
    codes, original = (
        each.vqvae.quantize.embedding.weight
        for each in (load_pipeline("em-ldm-64"), MAKERS["ldm"]())
    )
    assert torch.equal(codes, original)


@pytest.mark.parametrize("name", MODELS)
def test_generate_takes_a_name_and_image_i_depends_on_seed_and_i(box, name, tmp_path):
    config = GenerationConfig(name, str(tmp_path / "a"), num_images=20, batch_size=20, seed=3)
    record = generate_images(config)
    assert (record["name"], record["settings"]["precision"]) == (name, "no")
    generate_images(
        GenerationConfig(name, str(tmp_path / "b"), num_images=18, batch_size=18, seed=3)
    )
    a, b = (read_image_folder(tmp_path / each).batch(range(18)) for each in "ab")
    assert np.array_equal(a, b)


def test_the_command_takes_a_name(box, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate.py", "--model", "em-ldm-64", "--out", "images"])
    sys.argv += ["--num-images", "3", "--guidance-scale", "1.5"]
    generate_command.run()
    assert "3 images in images" in capsys.readouterr().out
    assert len(list(Path("images").glob("*.png"))) == 3


def test_evaluation_autoencoders_and_walks_take_a_name(box):
    assert [each.model.kind for each in name_candidates(MODELS)] == ["ldm", "stylegan2"]
    assert name_candidates(["mine=em-ldm-64"])[0].name == "mine"
    assert load_autoencoder("em-ldm-64").dtype == torch.float32
    assert styles.load_pipeline("em-stylegan2-64").generator.config.resolution == 16
    with pytest.raises(ValueError, match="em-ldm-64 is no StyleGAN"):
        styles.load_pipeline("em-ldm-64")


def test_a_published_model_of_the_package_loads_without_it(box, tmp_path):
    """The repository has the code that the package's folder leaves out, and its licence."""
    names = {name: tmp_path / f"repo-{name}" for name in MODELS}
    for name, out in names.items():
        publish_run(PublishConfig(name, f"you/{name}", num_samples=0, dry_run=str(out)))
        assert "license: apache-2.0" in (out / "README.md").read_text()
        assert json.loads((out / "run.json").read_text())["config"]["data"] == "synthetic-varied"
    code = """
import importlib.util, sys
import numpy as np, torch
from diffusers import DiffusionPipeline
assert not any(importlib.util.find_spec(name) for name in ("em_diffusion", "em_pretrained"))
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    np.save(f"{folder}.npy", pipe(2, generator=generators, output_type="np").images)
"""
    packages = sysconfig.get_path("purelib")
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += [{packages!r}]\n{code}"]
    result = subprocess.run(
        [*command, *map(str, names.values())],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    for name, out in names.items():
        assert np.abs(np.load(f"{out}.npy") - draw(load_pipeline(name), 0, 1)).max() < 1e-5


def test_the_demo_page_opens_with_the_models_of_the_package(box, monkeypatch):
    spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    monkeypatch.delenv("EM_MODELS", raising=False)
    assert app.parse_arguments([]).models == list(MODELS)
    assert app.parse_arguments(["--models", "runs/x"]).models == ["runs/x"]


# --- the trained models themselves


@pytest.mark.parametrize("name", em_pretrained.NAMES)
def test_the_models_are_whole(name):
    if name in ABSENT:
        pytest.skip(f"the package does not hold {name} yet")
    folder = em_pretrained.path(name)
    assert not list(folder.rglob("*.py"))
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert em_pretrained.read_license(folder) == "apache-2.0"
    model = read_model(name)
    assert model.name == name
    pipeline = model.load()
    images = draw(pipeline, *range(4))
    assert images.shape == (4, 64, 64, 1)
    assert images.std() > 0.02
    assert isinstance(pipeline, EMLatentDiffusionPipeline) == name.startswith("em-ldm")


def test_the_models_are_small():
    files = [path for path in em_pretrained.box.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_MEGABYTES * 1e6
