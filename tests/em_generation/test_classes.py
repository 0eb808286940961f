"""Images by class: generate.py, the files beside them, the demo page, a repository's reader."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from em_data import DataConfig, load_tiles, to_uint8
from em_diffusion.family import LDMOptions
from em_generation import demo
from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import load_pipeline
from em_hub.publish import PublishConfig, publish_run
from support.hub_server import make_environment
from support.models import draw, make_conditional_ldm, make_ldm

sys.path.insert(0, str(Path(__file__).parent))
from test_demo import load_app

NAMES = ["copper", "steel", "tin"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "metals"
    make_conditional_ldm(NAMES).save_pretrained(folder)
    return str(folder)


def generate(folder, out, num_images, classes, **options):
    options = LDMOptions(scheduler="ddim", num_inference_steps=2, classes=classes)
    config = GenerationConfig(folder, str(out), num_images, precision="no", options=options)
    return generate_images(config)


def read_lines(out):
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def test_files_name_their_classes(folder, tmp_path):
    """`datasets` finds them; an image that is added later has the class of its number."""
    import datasets

    record = generate(folder, tmp_path, 3, ("tin", "copper"))
    assert record["settings"]["classes"] == ["tin", "copper"]
    assert record == json.loads((tmp_path / "generation.json").read_text())
    names = ["tin", "copper", "tin", "copper", "tin"]
    for num_images in (3, 5):
        generate(folder, tmp_path, num_images, ("tin", "copper"))
        expected = [
            {"file_name": f"{i:06d}.png", "class_name": name}
            for i, name in enumerate(names[:num_images])
        ]
        assert read_lines(tmp_path) == expected
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=cache)["train"]
    assert loaded["class_name"] == names
    with pytest.raises(ValueError, match=r"other settings \(classes differs\)"):
        generate(folder, tmp_path, 5, ("tin",))


def test_generated_classes_are_read_back(folder, tmp_path):
    """As the classes of micrographs, by the images' names."""
    generate(folder, tmp_path / "images", 8, ("tin", "copper"))
    config = DataConfig(resolution=16, symmetries="none", cache_dir=str(tmp_path / "cache"))
    tiles = load_tiles(str(tmp_path / "images"), config, log=lambda line: None)
    assert tiles.class_names == ("copper", "tin")
    names = [tiles.class_names[i] for i in tiles.class_labels(range(8))]
    numbers = [int(Path(name).stem) for name in tiles.rows["micrograph"]]
    assert sorted(numbers) == list(range(8))
    assert names == [("tin", "copper")[number % 2] for number in numbers]


def test_a_data_set_names_its_classes(folder, tmp_path):
    import datasets

    options = LDMOptions(scheduler="ddim", num_inference_steps=2, classes=("1", "tin", "tin"))
    config = GenerationConfig(
        folder, str(tmp_path), 4, precision="no", format="arrow", options=options
    )
    generate_images(config)
    loaded = datasets.load_from_disk(str(tmp_path))
    assert loaded["class_name"][:] == ["steel", "tin", "tin", "steel"]


def test_without_classes_there_is_no_metadata(folder, tmp_path):
    record = generate(folder, tmp_path, 1, ())
    assert "classes" not in record["settings"]
    assert not (tmp_path / "metadata.jsonl").exists()


# gradio leaves an event loop and its sockets to the garbage collector
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
def test_the_page_draws_a_class(folder, tmp_path):
    """As generate.py does; a model without classes beside it does not show the choice."""
    pytest.importorskip("gradio")
    make_ldm().save_pretrained(tmp_path / "plain")
    models = [
        demo.load_demo_model(str(source), dtype=torch.float32)
        for source in (tmp_path / "plain", folder)
    ]
    page = load_app().build_interface(models, tmp_path)
    show = next(each.fn for each in page.fns.values() if each.fn.__name__ == "show")
    inputs = {each.elem_id: each for each in page.blocks.values() if hasattr(each, "elem_id")}
    assert not inputs["classes"].visible
    assert inputs["scheduler"].visible
    values = ("ddim", 2, 1.0, "tin")  # scheduler, steps, guidance; the class, which only one has
    caption, drawing = show(2, 3, "8-bit PNG", folder, *values, None)[1:3]
    assert "class: tin" in caption
    generate(folder, tmp_path / "images", 3, ("tin",))
    other = show(2, 3, "8-bit PNG", folder, *values[:3], "copper", None)[2]
    assert not torch.allclose(drawing.images, other.images, atol=1e-2)
    plain = show(2, 3, "8-bit PNG", models[0].source, *values, None)[1]
    assert "class" not in plain
    del page, show
    gc.collect()  # here, where their warnings are expected


def test_the_demo_draws_what_generate_draws(folder, tmp_path):
    generate(folder, tmp_path, 3, ("tin", "steel"))
    files = sorted(tmp_path.glob("0*.png"))
    expected = np.stack([np.asarray(Image.open(path)) for path in files]).astype(int)
    model = demo.load_demo_model(folder, dtype=torch.float32)
    values = {"scheduler": "ddim", "num_inference_steps": 2}
    drawn = [demo.draw(model, 0, 3, values | {"classes": name}) for name in ("tin", "steel")]
    levels = [to_uint8(each.images)[:, 0].astype(int) for each in drawn]
    together = np.stack([levels[0][0], levels[1][1], levels[0][2]])
    assert np.abs(together - expected).max() <= 1


STRANGER = """
import sys

try:
    import em_diffusion
    raise SystemExit("our packages are found")
except ImportError:
    pass
import numpy as np
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("you/metals", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
assert pipe.labels == {"copper": 0, "steel": 1, "tin": 2}, pipe.labels
try:
    pipe(class_labels="gold")
    raise SystemExit("gold was drawn")
except ValueError as error:
    assert "copper, steel, tin" in str(error)
rngs = [torch.Generator().manual_seed(seed) for seed in range(2)]
images = pipe(generator=rngs, class_labels=["tin", "steel"], output_type="np").images
np.save(sys.argv[1], images)
"""


def test_a_stranger_draws_a_published_class_by_name(folder, tmp_path, hub):
    """Over the network, by diffusers and the repository's own code alone."""
    config = PublishConfig(folder, "you/metals", num_samples=2)
    publish_run(config, say=lambda text: None)
    card = hub.read("you/metals", "README.md").decode()
    assert "It has classes: copper, steel, tin." in card
    assert 'pipe(class_labels="copper")' in card
    assert list(load_pipeline("you/metals").labels) == NAMES
    out, packages = tmp_path / "images.npy", [p for p in sys.path if p.endswith("site-packages")]
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {packages!r}{STRANGER}", out],
        cwd=tmp_path,
        env=make_environment(hub, tmp_path / "stranger"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    expected = draw(make_conditional_ldm(NAMES), 0, 1, class_labels=["tin", "steel"])
    np.testing.assert_allclose(np.load(out), expected, atol=1e-5)
