import gc
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import em_pretrained
from em_data import read_micrograph, to_uint8, to_uint16
from em_generation import demo
from em_generation.families import find_family
from em_generation.generate import GenerationConfig, generate_images
from em_training.walk import walk_noise
from support import models

ROOT = Path(__file__).parents[2]
SMALL = {
    "ldm": {"scheduler": "ddim", "num_inference_steps": 2},
    "stylegan": {"truncation_psi": 0.7},
    "mask-ldm": {"mask_scale": 1.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family, make in models.MAKERS.items():
        make().save_pretrained(root / family)
    return {family: str(root / family) for family in models.MAKERS}


@pytest.fixture(scope="module")
def ldm(folders):
    return demo.load_demo_model(folders["ldm"], dtype=torch.float32)


@pytest.fixture(scope="module")
def stylegan(folders):
    return demo.load_demo_model(folders["stylegan"], dtype=torch.float32)


def load_app():
    spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", models.MAKERS)
def test_images_are_those_of_generate(family, folders, tmp_path):
    options = find_family(family).options(**SMALL[family])
    config = GenerationConfig(
        folders[family], str(tmp_path), 3, seed=5, precision="no", bits=16, options=options
    )
    generate_images(config)
    files = sorted(tmp_path.glob("0*.png"))
    expected = np.stack([np.asarray(Image.open(path)) for path in files]).astype(int)
    model = demo.load_demo_model(folders[family], dtype=torch.float32)
    drawing = demo.draw(model, 5, 3, SMALL[family])
    # another batch size rounds another way
    assert np.abs(to_uint16(drawing.images)[:, 0].astype(int) - expected).max() <= 2
    assert drawing.settings["Seed"] == 5
    assert drawing.pixel_size_nm == 0.5


def test_samplers_leave_the_saved_one_in_place(ldm):
    saved, config = ldm.pipeline.scheduler, dict(ldm.pipeline.config)
    seen = []
    values = {"scheduler": "dpm-solver++", "num_inference_steps": 4}
    a = demo.draw(ldm, 0, 2, values, seen.append)
    b = demo.draw(ldm, 0, 2)
    assert ldm.pipeline.scheduler is saved
    assert dict(ldm.pipeline.config) == config
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert not torch.equal(a.images, b.images)
    assert b.settings == {"Seed": 0, "Sampler": "DDIM, as saved", "Steps": 3, "Guidance": 1.25}
    with pytest.raises(ValueError, match="Sampler is flow-euler; choose one of DDIM, as saved"):
        demo.draw(ldm, 0, 1, {"scheduler": "flow-euler"})


def test_the_choice_of_a_sampler_sets_its_steps(ldm):
    sampler, steps, guidance = ldm.controls
    assert guidance.value == 1.25
    assert set(sampler.sets) == set(sampler.choices)
    assert sampler.sets[sampler.value] == {"num_inference_steps": steps.value} != {}
    assert sampler.sets["ddim"] == {"num_inference_steps": 50}
    assert all(1 <= each["num_inference_steps"] <= steps.maximum for each in sampler.sets.values())


def test_mixing_all_thirds_is_the_other_style(stylegan):
    plain = demo.draw(stylegan, 1, 2).images

    def mix(seed, layers="coarse", **values):
        return demo.draw(stylegan, 1, 2, {"mix_seed": seed, "mix_layers": layers} | values).images

    same = mix(1, "fine")
    torch.testing.assert_close(same[0], plain[0])  # a style mixed with itself
    assert not torch.allclose(same[1], plain[1])
    for layers in ("coarse", "middle", "fine"):
        assert not torch.allclose(mix(9, layers), plain)
    typical = mix(9, truncation_psi=0)
    expected = demo.draw(stylegan, 1, 2, {"truncation_psi": 0}).images
    torch.testing.assert_close(typical, expected)
    with pytest.raises(ValueError, match="choose one of coarse, middle, fine"):
        mix(9, "all")


def test_a_walk_of_noise_keeps_unit_variance_and_passes_the_keys():
    keys = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    frames = walk_noise(keys, 6)
    assert frames.shape == (24, 3, 64, 64)
    torch.testing.assert_close(frames[::6], keys)
    variance = frames.flatten(1).var(dim=1)
    # five deviations of a sample variance
    assert (variance - 1).abs().max() < 5 * (2 / keys[0].numel()) ** 0.5


def test_walks_pass_the_images_of_the_seed(ldm, stylegan, tmp_path, monkeypatch):
    frames = demo.walk(ldm, 3, 5, SMALL["ldm"])
    assert len(frames.images) == 20
    images = demo.draw(ldm, 3, 4, SMALL["ldm"]).images
    assert 0.02 < (frames.images[::5] - images).std() < 0.2  # of which each has its own grain
    monkeypatch.setattr(ldm.pipeline, "grain", None)
    images = demo.draw(ldm, 3, 4, SMALL["ldm"]).images
    torch.testing.assert_close(frames.images[::5], images, atol=1e-4, rtol=0)
    seen = []
    frames = demo.walk(stylegan, 3, 5, {"truncation_psi": 0.5, "mix_seed": 9}, seen.append)
    assert seen[-1] == 1.0
    assert not torch.allclose(frames.images[0], frames.images[5])
    unmixed = demo.walk(stylegan, 3, 5, {"truncation_psi": 0.5})
    assert torch.equal(frames.images, unmixed.images)  # as the page says
    path = demo.save_walk(frames, tmp_path / "walk.gif")
    with Image.open(path) as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (20, (256, 256), 0)
        film.seek(7)
        levels = np.asarray(film.convert("L"))
    assert np.array_equal(levels[::16, ::16], to_uint8(frames.images[7, 0]))


def make_drawing(num_images=3, pixel_size_nm=0.5, size=32):
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(num_images, 1, size, size, generator=rng) * 2 - 1
    return demo.Drawing(images, "My GAN/1", pixel_size_nm, {"Seed": 7, "Truncation": 0.5})


def test_the_scale_bar_has_the_length_that_it_says(tmp_path):
    drawing = make_drawing(4)
    picture = np.asarray(Image.open(demo.save_grid_with_scale_bar(drawing, tmp_path / "bar.png")))
    plain = np.asarray(
        Image.open(demo.save_grid_with_scale_bar(make_drawing(4, None), tmp_path / "plain.png"))
    )
    factor = plain.shape[1] // 66  # 2 x 32 pixels and a gap of 2
    assert plain.shape == (66 * factor, 66 * factor)
    assert factor > 1
    first = plain[: 32 * factor : factor, : 32 * factor : factor]
    assert np.array_equal(first, to_uint8(drawing.images[0, 0]))
    assert np.array_equal(picture[: len(plain)], plain)
    strip = picture[len(plain) :]
    bar = strip[(strip[:, 0] == 0).argmax()]
    length = int((bar == 255).argmax())
    # 32 pixels of 0.5 nm are 16 nm: the longest round length within three quarters is 10 nm, 20
    # pixels
    assert abs(length - 20 * factor) <= 1
    assert (strip[:, length + 1 :] < 128).any()  # its label


@pytest.mark.parametrize("format", demo.FORMATS)
def test_downloads_hold_every_image_and_the_pixel_size(format, tmp_path):
    drawing = make_drawing()
    path = demo.save_download(drawing, tmp_path, format)
    convert = to_uint16 if "16" in format else to_uint8
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read("settings.json"))
        archive.extractall(tmp_path / "out")
    assert about["settings"]["Seed"] == 7
    assert about["pixel_size_nm"] == 0.5
    files = sorted((tmp_path / "out").glob("0*"))
    assert [file.name[:6] for file in files] == ["000000", "000001", "000002"]
    for file, image in zip(files, drawing.images, strict=True):
        read = read_micrograph(file, label_bar="keep")
        assert np.array_equal(read.image, convert(image[0]))
        assert read.pixel_size_nm == 0.5
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["out"]


def test_one_image_is_one_file(tmp_path):
    drawing = make_drawing(1, None)
    path = demo.save_download(drawing, tmp_path, "16-bit TIFF")
    assert path.name.startswith("my-gan-1-")
    assert path.name.endswith("-seed-7-16-bit.tif")
    levels = tifffile.imread(io.BytesIO(path.read_bytes()))
    assert np.array_equal(levels, to_uint16(drawing.images[0, 0]))
    with pytest.raises(ValueError, match="8-bit PNG, 16-bit TIFF"):
        demo.save_download(drawing, tmp_path, "JPEG")


def test_old_results_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "KEPT_RESULTS", 2)
    made = []
    for i in range(4):
        made.append(demo.make_result_folder(tmp_path, i))
        os.utime(made[-1], ns=(10**18 + i, 10**18 + i))
    assert [path.exists() for path in made] == [False, False, True, True]


def test_mistakes_say_how_to_fix_them(ldm, stylegan):
    with pytest.raises(ValueError, match="Images is 17; choose 1 to 16"):
        demo.draw(stylegan, 0, 17)
    with pytest.raises(ValueError, match="Steps is 0; choose 1 to 250"):
        demo.draw(ldm, 0, 1, {"num_inference_steps": 0})
    with pytest.raises(ValueError, match="Frames per image is 1000"):
        demo.walk(ldm, 0, 1000)


def test_seeds_are_whole_numbers_from_0_on():
    assert [demo.read_seed(value) for value in (0, 11.0, "7")] == [0, 11, 7]
    assert [demo.read_seed(value, optional=True) for value in (None, "", 3)] == [None, None, 3]
    for value in (None, 1.5, -1, "eleven", float("nan"), 2**60):
        with pytest.raises(ValueError, match="Enter a whole number from 0 on"):
            demo.read_seed(value)
    with pytest.raises(ValueError, match=r"The seed is 1\.5"):
        demo.read_seed(1.5, optional=True)


def test_real_micrographs_are_those_held_out_from_the_run(folders, tmp_path):
    from dataclasses import asdict, replace

    from em_data import DataConfig, load_data

    tiles = DataConfig(num_micrographs=4, resolution=32, cache_dir=str(tmp_path))
    model = demo.load_demo_model(folders["stylegan"]).model
    assert demo.load_real_images(model) is None
    model = replace(
        model, config={"data": "synthetic", "tiles": json.loads(json.dumps(asdict(tiles)))}
    )
    real = demo.load_real_images(model, 3)
    assert real.describe().startswith("Simulated micrographs: 3 images")
    data = load_data("synthetic", tiles, log=lambda line: None)
    held_out = data.held_out.batch([0, len(data.held_out) - 1])
    assert torch.equal(torch.as_tensor(real.images[[0, 2]]), torch.as_tensor(held_out))
    assert demo.load_real_images(replace(model, config={"data": "/nowhere", "tiles": {}})) is None
    many = asdict(replace(tiles, num_micrographs=100_000))  # of which none is drawn
    varied = {"data": "synthetic-varied", "tiles": json.loads(json.dumps(many))}
    real = demo.load_real_images(replace(model, config=varied), 2)
    assert real.images.shape == (2, 1, 32, 32)
    assert real.settings == {"Held out from training": "synthetic-varied"}


@pytest.mark.parametrize(
    "change",
    [
        {"data": "FOLDER"},
        {"data": 5},
        {"data": ["synthetic"]},
        {"data": "synthetic/../../etc"},
        {"tiles": []},
        {"tiles": {"resolution": 10**9}},
        {"tiles": {"micrograph_size": 65_536}},
        {"tiles": {"num_micrographs": 10**7}},
        {"tiles": {"num_synthetic": 10**7}},
    ],
    ids=str,
)
def test_a_repository_names_no_folder_and_no_huge_micrographs_for_the_page(
    folders, tmp_path, change
):
    """Nor a folder for the cache: else a page would show pictures of this machine to the world."""
    from dataclasses import replace

    (tmp_path / "private").mkdir()
    for i in range(4):
        Image.fromarray(np.full((64, 64), i, np.uint8)).save(tmp_path / "private" / f"{i}.png")
    tiles = {"resolution": 32, "cache_dir": str(tmp_path / "cache")}
    config = {"data": "synthetic", "tiles": tiles} | change
    if config["data"] == "FOLDER":
        config["data"] = str(tmp_path / "private")
    model = replace(demo.load_demo_model(folders["stylegan"]).model, folder=None, config=config)
    assert demo.load_real_images(model) is None
    assert not (tmp_path / "cache").exists()


def test_models_come_from_the_command_line_or_the_environment(monkeypatch):
    app = load_app()
    monkeypatch.setenv("EM_MODELS", "you/a you/b@v1")
    assert app.parse_arguments([]).models == ["you/a", "you/b@v1"]
    assert app.parse_arguments(["--models", "runs/x", "runs/y"]).models == ["runs/x", "runs/y"]
    monkeypatch.delenv("EM_MODELS")
    assert app.parse_arguments([]).models == list(em_pretrained.list_models())


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_one_sentence_says_what_to_install(folders):
    command = [sys.executable, "app.py", "--models", folders["ldm"]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "em-synthesis[demo]" in result.stderr
    assert "Traceback" not in result.stderr


# gradio leaves an event loop and its sockets to the garbage collector
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
def test_the_interface_draws_and_offers_a_download(ldm, stylegan, tmp_path):
    gradio = pytest.importorskip("gradio")
    page = load_app().build_interface([ldm, stylegan], tmp_path, real=make_drawing())
    shows = [each.fn for each in page.fns.values() if each.fn.__name__ == "show"]
    assert len(shows) == 4  # two models, each by its button and by the comparison
    values = {
        "ldm": (ldm.source, "ddim", 2, 1.5),
        "stylegan": (stylegan.source, 0.5, "", "coarse"),
    }
    for show, family in zip(shows, values, strict=False):
        picture, caption, drawing, download = show(2, 3, "16-bit TIFF", *values[family], None)
        assert Image.open(picture).mode == "L"
        assert "seed: 2" in caption
        assert "second style" not in caption
        assert len(drawing.images) == 3
        assert "16-bit.zip" in str(download.value)
    mixed = shows[1](2, 3, "8-bit PNG", stylegan.source, 0.5, "9", "fine", None)[2]
    assert mixed.settings["Seed of a second style"] == "9"
    with pytest.raises(gradio.Error, match="choose 1 to 16"):
        shows[0](2, 17, "8-bit PNG", *values["ldm"], None)
    with pytest.raises(gradio.Error, match="The seed is empty"):
        shows[0]("", 1, "8-bit PNG", *values["ldm"], None)
    endpoints = page.get_api_info()["named_endpoints"]
    assert set(endpoints) == {f"/{name}_{verb}" for name in values for verb in ("generate", "walk")}
    names = [each["parameter_name"] for each in endpoints["/stylegan_generate"]["parameters"]]
    assert names == [
        "seed",
        "num_images",
        "format",
        "model",
        "truncation_psi",
        "mix_seed",
        "mix_layers",
    ]
    del page, shows
    gc.collect()  # here, where their warnings are expected
