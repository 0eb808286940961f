"""A family from one file, with one line of registration, goes through every command."""

import gc
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from em_commands import generate as command
from em_generation import demo
from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_generation.families import FAMILIES
from em_generation.generate import generate_images
from em_generation.loading import read_model
from em_hub.publish import PublishConfig, publish_run
from support import toy_family

ROOT = Path(__file__).parents[2]


@pytest.fixture
def toy(tmp_path):
    FAMILIES.append(toy_family.FAMILY)  # the one line
    toy_family.make_toy().save_pretrained(tmp_path / "toy" / "pipeline")
    content = {"name": "my-toy", "family": "toy", "num_images_seen": 8, "train_seconds": 1.0}
    (tmp_path / "toy" / "run.json").write_text(json.dumps(content))
    yield str(tmp_path / "toy")
    FAMILIES.remove(toy_family.FAMILY)


def test_it_generates(toy, tmp_path):
    flags = ["--model", toy, "--out", str(tmp_path / "images"), "--num-images", "5"]
    config, model = command.parse([*flags, "--contrast", "0.5"])
    record = generate_images(config, model)
    assert (record["name"], record["family"]) == ("my-toy", "toy")
    assert record["settings"]["contrast"] == 0.5
    assert len(list((tmp_path / "images").glob("*.png"))) == 5
    with pytest.raises(ValueError, match="--eta: only models of the family LDM"):
        command.parse([*flags, "--eta", "1"])


def test_it_is_evaluated(toy, tmp_path, capsys):
    config = EvaluationConfig(
        models=(toy,),
        out=str(tmp_path / "report"),
        data="synthetic",
        tiles=("resolution=32", "num_micrographs=4", f'cache_dir="{tmp_path}"'),
        num_images=12,
        sampling=("contrast=0.5",),
    )
    assert evaluate_runs(config).exists()
    report = (tmp_path / "report" / "report.json").read_text()
    (model,) = json.loads(report)["models"]
    assert (model["name"], model["info"]["contrast"]) == ("Toy", 0.5)
    assert "autoencoder" in report  # its reference level
    assert "Toy" in capsys.readouterr().out


def test_it_is_published(toy, tmp_path):
    out = publish_run(
        PublishConfig(toy, "you/toy", dry_run=str(tmp_path / "repository"), num_samples=4),
        say=lambda text: None,
    )
    card = (Path(out) / "README.md").read_text()
    assert "Electron micrographs by a toy: my-toy" in card
    assert (Path(out) / "generator" / "diffusion_pytorch_model.bf16.safetensors").exists()
    model = read_model(out)
    assert (model.name, model.kind, model.num_images_seen) == ("my-toy", "toy", 8)


def test_the_family_of_the_documentation_generates(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "adding-a-family.md").read_text()
    for name, code in re.findall(r"^```python\n# (\S+)\n(.*?)^```", page, re.M | re.S):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    family = importlib.import_module("em_toy.family").FAMILY
    model, out = tmp_path / "pipeline", tmp_path / "images"
    family.import_pipeline()(toy_family.make_toy().generator, 0.5).save_pretrained(model)
    FAMILIES.append(family)
    try:
        flags = ["--model", str(model), "--out", str(out), "--num-images", "5"]
        record = generate_images(*command.parse([*flags, "--brightness", "0.5"]))
    finally:
        FAMILIES.remove(family)
    assert record["settings"]["brightness"] == 0.5
    assert len(list(out.glob("*.png"))) == 5


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
def test_it_is_shown_in_the_demo(toy, tmp_path):
    model = demo.load_demo_model(toy)
    drawing = demo.draw(model, 3, 2, {"contrast": 0.5})
    assert drawing.images.shape == (2, 1, 32, 32)
    assert demo.walk(model, 3, 5).images.shape == (20, 1, 32, 32)
    pytest.importorskip("gradio")
    spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    page = app.build_interface([model], tmp_path)
    show = next(each.fn for each in page.fns.values() if each.fn.__name__ == "show")
    picture, caption, *_ = show("3", 2, "8-bit PNG", toy, 0.5, None)
    assert np.asarray(Image.open(picture)).ndim == 2
    assert "contrast: 0.5" in caption
    assert {"/toy_generate", "/toy_walk"} == set(page.get_api_info()["named_endpoints"])
    del page, show
    gc.collect()  # here, where their warnings are expected
