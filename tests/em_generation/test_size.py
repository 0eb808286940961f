"""generate.py --size: folders of images larger than tiles."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from em_commands import generate as command
from em_generation import generate as module
from em_generation.evaluate import EvaluationConfig, evaluate_runs
from em_generation.generate import generate_images, write_preview
from support.models import make_ldm, make_stylegan, make_stylegan3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    make_ldm().save_pretrained(folder)
    return str(folder)


def generate(model, out, *flags):
    own = ["--model", model, "--out", str(out), "--precision", "no"]
    return generate_images(*command.parse([*own, "--num-images", "3", *flags]))


def read(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


def test_images_have_the_size_and_the_pixel_size(model, tmp_path):
    record = generate(model, tmp_path / "png", "--size", "40x24")
    assert (record["settings"]["size"], record["num_images"]) == ("40x24", 3)
    assert read(tmp_path / "png").shape == (3, 40, 24)
    with Image.open(tmp_path / "png" / "000000.png") as image:
        assert float(image.text["pixel_size_nm"]) == 0.5
    generate(model, tmp_path / "tiff", "--size=24", "--format", "tiff", "--bits", "16")
    with tifffile.TiffFile(tmp_path / "tiff" / "000002.tif") as file:
        assert file.asarray().shape == (24, 24)
        assert file.imagej_metadata["unit"] == "nm"
        assert float(file.imagej_metadata["pixel_size_nm"]) == 0.5


def test_an_image_depends_on_its_number_alone(model, tmp_path):
    for name, batch_size in (("a", 16), ("b", 50)):
        generate(model, tmp_path / name, "--size", "48x32", "--batch-size", str(batch_size))
    np.testing.assert_array_equal(read(tmp_path / "a"), read(tmp_path / "b"))
    assert len(np.unique(read(tmp_path / "a").reshape(3, -1), axis=0)) == 3


def test_the_size_of_a_tile_changes_nothing(model, tmp_path):
    records = [generate(model, tmp_path / "a")["settings"]]
    records.append(generate(model, tmp_path / "b", "--size", "16x16")["settings"])
    assert records[0] == records[1]
    assert "size" not in records[0]
    np.testing.assert_array_equal(read(tmp_path / "a"), read(tmp_path / "b"))


def test_a_folder_is_resumed_with_its_size_alone(model, tmp_path):
    generate(model, tmp_path / "whole", "--size", "24x40")
    generate(model, tmp_path / "parts", "--size", "24x40", "--num-images", "1")
    generate(model, tmp_path / "parts", "--size", "24x40")
    np.testing.assert_array_equal(read(tmp_path / "parts"), read(tmp_path / "whole"))
    for flags in ([], ["--size", "40x24"]):
        with pytest.raises(ValueError, match=r"other settings .*size"):
            generate(model, tmp_path / "parts", *flags)


@pytest.mark.parametrize("size", ["31x40", "8", "99999999x99999999"])
def test_an_impossible_size_leaves_no_folder_of_images(model, tmp_path, size):
    with pytest.raises(ValueError, match=rf"--size is {size}: .*The nearest size is"):
        generate(model, tmp_path / "out", "--size", size)
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_a_stylegan2_refuses_other_sizes(tmp_path):
    make_stylegan().save_pretrained(tmp_path / "gan")
    with pytest.raises(ValueError, match=r"--size is 32x32: .*a StyleGAN2Generator has one size"):
        generate(str(tmp_path / "gan"), tmp_path / "out", "--size", "32x32")


def test_a_stylegan3_draws_a_larger_canvas(tmp_path):
    make_stylegan3().save_pretrained(tmp_path / "gan")
    for name, batch_size in (("a", "1"), ("b", "50")):
        own = ("--size", "48x32", "--batch-size", batch_size)
        record = generate(str(tmp_path / "gan"), tmp_path / name, *own)
    assert record["settings"]["size"] == "48x32"
    assert read(tmp_path / "a").shape == (3, 48, 32)
    np.testing.assert_array_equal(read(tmp_path / "a"), read(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"--size is 8: .*The nearest size is 16"):
        generate(str(tmp_path / "gan"), tmp_path / "out", "--size", "8")


def test_the_bar_moves_within_an_image(model, tmp_path, monkeypatch):
    shown, real = io.StringIO(), module.tqdm
    monkeypatch.setattr(
        module, "tqdm", lambda **options: real(**options | {"file": shown, "mininterval": 0})
    )
    generate(model, tmp_path / "out", "--size", "80", "--batch-size", "16")
    text = shown.getvalue()
    assert "drawing by LDM:  11%" in text  # a third of the first of three images
    assert "0.3/3 [" in text
    assert "3.0/3 [" in text


def test_the_preview_has_a_scale_bar_and_stays_small(model, tmp_path, monkeypatch):
    generate(model, tmp_path / "out", "--size", "64")
    plain = read(tmp_path / "out")
    with Image.open(write_preview(tmp_path / "out")) as file:
        picture = np.asarray(file)
    factor = 4  # 130 pixels of two columns become at least 512
    assert picture.shape == (130 * factor + 6 * (130 * factor // 80), 130 * factor)
    np.testing.assert_array_equal(picture[: 64 * factor : factor, : 64 * factor : factor], plain[0])
    strip = picture[130 * factor :]
    bar = strip[(strip[:, 0] == 0).argmax()]
    # 64 pixels of 0.5 nm: 20 nm are the longest round length within three quarters, 40 pixels
    assert abs((bar == 255).argmax() - 40 * factor) <= 1
    monkeypatch.setattr(module, "PREVIEW_PX", 100)
    with Image.open(write_preview(tmp_path / "out")) as file:
        assert file.width == 512  # one image of 64, enlarged


def test_the_next_command_judges_the_folder_beside_the_model(model, tmp_path):
    flags = ["--model", model, "--out", "images", "--num-inference-steps", "4", "--size", "64"]
    config, _ = command.parse(flags)
    assert command.say_evaluation(config) == (
        f"python evaluate.py --models {model} images --sampling num_inference_steps=4"
    )


def test_models_are_judged_by_tiles(model, tmp_path):
    config = EvaluationConfig(
        models=(model,),
        out=str(tmp_path / "report"),
        data="synthetic",
        tiles=("resolution=16", "num_micrographs=4", f'cache_dir="{tmp_path}"'),
        num_images=12,
        sampling=("size=64x64",),
    )
    with pytest.raises(ValueError, match="judged by tiles"):
        evaluate_runs(config)
    assert not list((tmp_path / "report").glob("images*"))
