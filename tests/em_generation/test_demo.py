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

from em_data import read_micrograph, to_uint8, to_uint16
from em_diffusion.family import LDMOptions
from em_generation import demo
from em_generation.generate import GenerationConfig, generate_images
from em_stylegan.family import StyleGANOptions
from support import models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family, make in models.MAKERS.items():
        make().save_pretrained(root / family)
    return {family: str(root / family) for family in models.MAKERS}


@pytest.fixture(scope="module")
def ldm(folders):
    return demo.load_demo_model(folders["ldm"], "ldm", dtype=torch.float32)


@pytest.fixture(scope="module")
def stylegan(folders):
    return demo.load_demo_model(folders["stylegan"], "stylegan", dtype=torch.float32)


def load_app():
    spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["ldm", "stylegan"])
def test_images_are_those_of_generate(family, folders, ldm, stylegan, tmp_path):
    options = (
        LDMOptions(num_inference_steps=2, scheduler="ddim")
        if family == "ldm"
        else StyleGANOptions(truncation_psi=0.7)
    )
    generate_images(
        GenerationConfig(
            folders[family], str(tmp_path), 3, seed=5, precision="no", bits=16, options=options
        )
    )
    expected = np.stack(
        [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    ).astype(int)
    if family == "ldm":
        drawing = demo.draw_ldm_images(ldm, 5, 3, "ddim", 2)
    else:
        drawing = demo.draw_stylegan_images(stylegan, 5, 3, 0.7)
    assert (
        np.abs(to_uint16(drawing.images)[:, 0].astype(int) - expected).max() <= 2
    )  # another batch size rounds another way
    assert drawing.settings["seed"] == 5
    assert drawing.pixel_size_nm == 0.5


def test_samplers_leave_the_saved_one_in_place(ldm):
    saved = ldm.pipeline.scheduler
    seen = []
    a = demo.draw_ldm_images(ldm, 0, 2, "dpm-solver++", 4, seen.append)
    b = demo.draw_ldm_images(ldm, 0, 2)
    assert ldm.pipeline.scheduler is saved
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert not torch.equal(a.images, b.images)
    assert b.settings == {"seed": 0, "sampler": "DDIM", "steps": ldm.num_steps}
    with pytest.raises(ValueError, match="not for a model"):
        demo.draw_ldm_images(ldm, 0, 1, "flow-euler", 2)
    assert ldm.pipeline.scheduler is saved
    assert "flow-euler" not in ldm.list_samplers()


def test_mixing_all_thirds_is_the_other_style(stylegan):
    num_ws = stylegan.pipeline.generator.num_ws
    covered = [i for third in demo.MIX_LAYERS for i in range(*demo.find_layers(num_ws, third))]
    assert covered == list(range(num_ws))
    plain = demo.draw_stylegan_images(stylegan, 1, 2).images
    same = demo.draw_stylegan_images(stylegan, 1, 2, mix_seed=1, mix_layers="fine").images
    torch.testing.assert_close(same[0], plain[0])  # a style mixed with itself
    assert not torch.allclose(same[1], plain[1])
    mixed = [
        demo.draw_stylegan_images(stylegan, 1, 2, mix_seed=9, mix_layers=third).images
        for third in demo.MIX_LAYERS
    ]
    assert all(not torch.allclose(each, plain) for each in mixed)
    typical = demo.draw_stylegan_images(stylegan, 1, 2, truncation_psi=0.0, mix_seed=9)
    torch.testing.assert_close(
        typical.images, demo.draw_stylegan_images(stylegan, 1, 2, 0.0).images
    )
    with pytest.raises(ValueError, match="coarse, middle, fine"):
        demo.find_layers(num_ws, "all")


def test_a_walk_of_noise_keeps_unit_variance_and_passes_the_keys():
    keys = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    frames = demo.walk_noise(keys, 6)
    assert frames.shape == (24, 3, 64, 64)
    torch.testing.assert_close(frames[::6], keys)
    variance = frames.flatten(1).var(dim=1)
    assert (variance - 1).abs().max() < 5 * (
        2 / keys[0].numel()
    ) ** 0.5  # five deviations of a sample variance


def test_walks_pass_the_images_of_the_seed(ldm, stylegan, tmp_path, monkeypatch):
    frames = demo.walk_ldm(ldm, 3, 5, "ddim", 2)
    assert len(frames.images) == demo.NUM_KEYS * 5
    images = demo.draw_ldm_images(ldm, 3, 4, "ddim", 2).images
    assert 0.02 < (frames.images[::5] - images).std() < 0.2  # of which each has its own grain
    monkeypatch.setattr(ldm.pipeline, "grain", None)
    images = demo.draw_ldm_images(ldm, 3, 4, "ddim", 2).images
    torch.testing.assert_close(frames.images[::5], images, atol=1e-4, rtol=0)
    seen = []
    frames = demo.walk_stylegan(stylegan, 3, 5, 0.5, seen.append)
    assert seen[-1] == 1.0
    assert not torch.allclose(frames.images[0], frames.images[5])
    path = demo.save_walk(frames, tmp_path / "walk.gif")
    with Image.open(path) as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (20, (256, 256), 0)
        film.seek(7)
        levels = np.asarray(film.convert("L"))
    assert np.array_equal(levels[::16, ::16], to_uint8(frames.images[7, 0]))


def make_drawing(num_images=3, pixel_size_nm=0.5, size=32):
    images = (
        torch.rand(num_images, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    return demo.Drawing(images, "My GAN/1", pixel_size_nm, {"seed": 7, "truncation": 0.5})


def test_the_scale_bar_has_the_length_that_it_says(tmp_path):
    drawing = make_drawing(4)
    picture = np.asarray(Image.open(demo.save_grid_with_scale_bar(drawing, tmp_path / "bar.png")))
    plain = np.asarray(
        Image.open(demo.save_grid_with_scale_bar(make_drawing(4, None), tmp_path / "plain.png"))
    )
    factor = plain.shape[1] // 66  # 2 x 32 pixels and a gap of 2
    assert plain.shape == (66 * factor, 66 * factor)
    assert factor > 1
    assert np.array_equal(
        plain[: 32 * factor : factor, : 32 * factor : factor], to_uint8(drawing.images[0, 0])
    )
    assert np.array_equal(picture[: len(plain)], plain)
    strip = picture[len(plain) :]
    bar = strip[(strip[:, 0] == 0).argmax()]
    length = int((bar == 255).argmax())
    # 32 pixels of 0.5 nm are 16 nm: the longest round length within three quarters is 10 nm, 20 pixels
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
    assert about["seed"] == 7
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
    assert path.name == "My-GAN-1-seed-7-16-bit.tif"
    assert np.array_equal(
        tifffile.imread(io.BytesIO(path.read_bytes())), to_uint16(drawing.images[0, 0])
    )
    with pytest.raises(ValueError, match="8-bit PNG, 16-bit TIFF"):
        demo.save_download(drawing, tmp_path, "JPEG")


def test_old_results_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "KEPT_RESULTS", 2)
    made = []
    for i in range(4):
        made.append(demo.make_result_folder(tmp_path, i))
        os.utime(made[-1], ns=(10**18 + i, 10**18 + i))
    assert [path.exists() for path in made] == [False, False, True, True]


def test_mistakes_say_the_way_out(folders, ldm, stylegan):
    with pytest.raises(ValueError, match="give it as --stylegan"):
        demo.load_demo_model(folders["stylegan"], "ldm")
    with pytest.raises(ValueError, match="choose 1 to 16"):
        demo.draw_stylegan_images(stylegan, 0, 17)
    with pytest.raises(ValueError, match="num steps 0: choose 1 to 250"):
        demo.draw_ldm_images(ldm, 0, 1, num_steps=0)
    with pytest.raises(ValueError, match="frames"):
        demo.walk_ldm(ldm, 0, 1000)


def test_models_come_from_the_command_line_or_the_environment(monkeypatch):
    app = load_app()
    monkeypatch.delenv("EM_LDM", raising=False)
    monkeypatch.setenv("EM_STYLEGAN", "you/a you/b@v1")
    assert app.parse_arguments([]).stylegan == ["you/a", "you/b@v1"]
    arguments = app.parse_arguments(["--ldm", "runs/x", "--stylegan", "runs/y"])
    assert (arguments.ldm, arguments.stylegan) == (["runs/x"], ["runs/y"])
    monkeypatch.delenv("EM_STYLEGAN")
    with pytest.raises(ValueError, match="EM_LDM"):
        app.parse_arguments([])


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_one_sentence_says_what_to_install(folders):
    command = [sys.executable, "app.py", "--ldm", folders["ldm"]]
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
    page = load_app().build_interface([ldm], [stylegan], tmp_path)
    shows = [each.fn for each in page.fns.values() if each.fn.__name__ == "show"]
    assert len(shows) == 4  # two models, each by its button and by the comparison
    values = {"ldm": (ldm.source, "ddim", 2), "stylegan": (stylegan.source, 0.5, "", "coarse")}
    for show, family in zip(shows, values, strict=False):
        picture, caption, drawing, download = show(2, 3, "16-bit TIFF", *values[family])
        assert Image.open(picture).mode == "L"
        assert "seed 2" in caption
        assert "mix" not in caption
        assert len(drawing.images) == 3
        assert "16-bit.zip" in str(download.value)
    mixed = shows[1](2, 3, "8-bit PNG", stylegan.source, 0.5, "9", "fine")[2]
    assert mixed.settings["mix_seed"] == 9
    with pytest.raises(gradio.Error, match="choose 1 to 16"):
        shows[0](2, 17, "8-bit PNG", *values["ldm"])
    del page, shows
    gc.collect()  # here, where their warnings are expected


def test_an_empty_field_is_no_seed_and_a_word_is_refused():
    assert [demo.read_optional_seed(text) for text in ("", "  ", "0", " 11 ")] == [
        None,
        None,
        0,
        11,
    ]
    with pytest.raises(ValueError, match="whole number"):
        demo.read_optional_seed("eleven")
