"""Walks, mixing, truncation and projection, as they are called from the command line."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from em_data import to_uint8, write_image
from em_stylegan import EMStyleGANPipeline, StyleGAN2Generator, interpolate, project
from em_stylegan.em_stylegan1_generator import StyleGAN1Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.pictures import files, projection, styles
from em_stylegan.pictures.projection import (
    ProjectionConfig,
    learning_rate_factor,
    noise_regularization,
)
from em_training import make_generator
from em_training.walk import walk


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    generator = StyleGAN2Generator(
        32, z_dim=8, w_dim=8, mapping_depth=2, channel_base=256, max_channels=16
    ).eval()
    with torch.no_grad():
        generator.mapping_network.w_mean.normal_()
    return generator.requires_grad_(False)


@pytest.fixture(scope="module")
def model(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    EMStyleGANPipeline(generator).save_pretrained(folder / "pipeline")
    return folder


def test_walk_passes_its_keys_and_is_smooth_and_closed():
    keys = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = walk(keys, 1000)
    torch.testing.assert_close(path[::1000], keys)
    velocity = (path.roll(-1, dims=0) - path) * 1000  # around the end as well
    acceleration = (velocity - velocity.roll(1, dims=0)).abs()
    assert acceleration.max() < 0.05  # no jump of the velocity anywhere, which is of order 1
    torch.testing.assert_close(velocity[0], (keys[1] - keys[3]) / 2, atol=0.02, rtol=0)
    line = torch.arange(6.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        walk(line, 4)[8:12, 0], torch.tensor([2, 2.25, 2.5, 2.75], dtype=torch.float64)
    )


def test_mixing_takes_the_columns_styles_in_the_layers_alone(generator):
    ws = styles.draw_ws(generator, 0, 5)
    mixed = styles.mix_styles(ws[:2], ws[2:], (1, 3))
    assert mixed.shape == (2, 3, generator.num_ws, 8)
    for i in range(2):
        for j in range(3):
            assert torch.equal(mixed[i, j, 1:3], ws[2 + j, 1:3])
            assert torch.equal(mixed[i, j, [0, 3, 4]], ws[i, [0, 3, 4]])
    with pytest.raises(ValueError, match="not among the generator's 8"):
        styles.mix_styles(ws[:2], ws[2:], (3, 9))


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_walk_on_disk_keeps_every_grey_level(model, generator, tmp_path, monkeypatch, suffix):
    out = tmp_path / "new" / f"walk{suffix}"
    monkeypatch.setattr(
        sys, "argv", ["", "walk", str(model), str(out), "--num-keys", "2", "--frames-per-key", "3"]
    )
    interpolate.main()
    expected = to_uint8(styles.render(generator, walk(styles.draw_ws(generator, 0, 2), 3)))[:, 0]
    with Image.open(out) as video:
        assert video.n_frames == 6
        assert video.info["loop"] == 0
        for i, frame in enumerate(expected):
            video.seek(i)
            assert np.array_equal(np.asarray(video.convert("L")), frame)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_grids(model, generator, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "",
            "truncation",
            str(model),
            str(tmp_path / "t.png"),
            "--num-rows",
            "2",
            "--psi",
            "0",
            "1",
        ],
    )
    interpolate.main()
    grid = np.asarray(Image.open(tmp_path / "t.png"))
    assert grid.shape == (66, 66)
    assert np.array_equal(grid[:32, :32], grid[34:, :32])  # psi 0: the mean image, whatever the row
    ws = styles.draw_ws(generator, 0, 2)
    assert np.array_equal(grid[:32, 34:], to_uint8(generator.synthesis(ws, "const"))[0, 0])
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "",
            "mixing",
            str(model),
            str(tmp_path / "m.png"),
            "--num-rows",
            "1",
            "--num-columns",
            "1",
            "--layers",
            "0",
            "8",
        ],
    )
    interpolate.main()
    grid = np.asarray(Image.open(tmp_path / "m.png"))
    assert (grid[:32, :32] == 255).all()
    assert np.array_equal(grid[34:, 34:], grid[:32, 34:])  # all layers mixed: the column's image
    assert not np.array_equal(grid[34:, :32], grid[:32, 34:])


def test_mp4_is_encoded_where_there_is_an_encoder_and_refused_where_not(tmp_path, monkeypatch):
    images = torch.linspace(-1, 1, 4 * 32 * 32).reshape(4, 1, 32, 32)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"MP4 needs an encoder.*\.gif and \.png"):
        files.save_video(images, tmp_path / "a.mp4", 24)
    assert not list(tmp_path.iterdir())
    calls = []

    def run(command, input, **options):
        calls.append((command, input))
        with open(command[-1], "wb") as file:
            file.write(b"video")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(files, "find_encoder", lambda: "ffmpeg")
    monkeypatch.setattr(subprocess, "run", run)
    files.save_video(images, tmp_path / "a.mp4", 24)
    ((command, frames),) = calls
    assert frames == to_uint8(images).tobytes()
    assert command[command.index("-s") + 1] == "32x32"
    assert (tmp_path / "a.mp4").read_bytes() == b"video"
    with pytest.raises(ValueError, match="a video ends in"):
        files.save_video(images, tmp_path / "a.avi", 24)


def test_noise_regularisation_is_the_autocorrelation_over_scales():
    """Of stripes along x: -1 to the side and 1 down at the finest scale, nothing once halved. Of
    white noise: about nothing.
    """
    stripes = ((-1.0) ** torch.arange(16)).expand(16, 16)
    assert noise_regularization(stripes).item() == pytest.approx(1 + 1)
    constant = torch.ones(16, 16)
    assert noise_regularization(constant).item() == pytest.approx(
        2 + 2 * 4**2
    )  # the halved map is 2 everywhere
    white = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert noise_regularization(white) < 0.1
    x = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(noise_regularization, (x,))


def test_learning_rate_ramps():
    config = ProjectionConfig(num_steps=1000)
    assert [
        learning_rate_factor(step, config) for step in (0, 25, 50, 500, 750, 1000)
    ] == pytest.approx([0, 0.5, 1, 1, 1, 0])
    assert learning_rate_factor(875, config) == pytest.approx(0.5)


def test_projection_finds_an_image_of_the_generator_itself(generator):
    """Against another of its images: what is found is nearer than the mean image, and the noise
    maps stay normal.
    """
    w = styles.draw_ws(generator, 7, 1)[:, 0]
    target = generator.synthesis(w.unsqueeze(1).expand(-1, generator.num_ws, -1), "const")
    config = ProjectionConfig(num_steps=60, num_w_samples=200, pixel_weight=1.0)
    before = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    found, image, distances = projection.project(generator, target, config)
    mean, deviation = projection.measure_w(generator, 200, torch.Generator().manual_seed(0))
    first = generator.synthesis(mean.expand(1, generator.num_ws, -1), "const")
    assert (image - target).square().mean() < 0.5 * (first - target).square().mean()
    assert deviation > 0
    assert min(distances[-5:]) < distances[0]
    for name, noise in found.items():
        if name.startswith("noise/"):
            assert noise.mean().abs() < 1e-5
            assert noise.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert all(
        torch.equal(buffer, before[name]) for name, buffer in generator.named_buffers()
    )  # the model is left as it was


@pytest.mark.parametrize("kind", [StyleGAN1Generator, StyleGAN3Generator])
def test_projection_leaves_every_kind_of_generator_as_it_was(kind):
    """StyleGAN3 has no noise maps, and running magnitudes that must not follow what projection
    tries.
    """
    torch.manual_seed(0)
    generator = (
        kind(16, z_dim=8, w_dim=8, mapping_depth=2, channel_base=128, max_channels=8)
        .eval()
        .requires_grad_(False)
    )
    target = generator(torch.randn(1, 8), noise_mode="const")
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    found, image, _ = projection.project(
        generator, target, ProjectionConfig(num_steps=1, num_w_samples=50)
    )
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    if kind is StyleGAN3Generator:
        torch.testing.assert_close(
            generator.synthesis(found["w"].expand(1, generator.num_ws, -1)), image
        )
    mean, _ = projection.measure_w(generator, 50, make_generator(0, stream="projection"))
    assert not torch.equal(found["w"], mean), "the only step goes somewhere"


def test_projection_and_pictures_of_a_class():
    torch.manual_seed(0)
    generator = StyleGAN2Generator(
        8, z_dim=8, w_dim=8, mapping_depth=2, channel_base=64, max_channels=8, num_classes=3
    ).eval()
    first, second = (styles.draw_ws(generator, 0, 2, class_label=label) for label in (0, 2))
    torch.testing.assert_close(first, generator.mapping(draw_z(0, 2), torch.tensor([0, 0])))
    assert not torch.equal(first, second)
    config = ProjectionConfig(num_steps=1, num_w_samples=20)
    target = torch.zeros(1, 1, 8, 8)
    distance = torch.nn.functional.mse_loss  # the perceptual one needs larger images
    found = [
        projection.project(generator, target, config, distance, class_label=label)[0]["w"]
        for label in (0, 2)
    ]
    assert (found[0] - found[1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="has 3 classes"):
        projection.project(generator, target, config, distance)


def test_pictures_of_a_class_by_name(tmp_path, monkeypatch):
    torch.manual_seed(0)
    generator = StyleGAN2Generator(
        8, z_dim=8, w_dim=8, mapping_depth=2, channel_base=64, max_channels=8, num_classes=2
    )
    EMStyleGANPipeline(generator.eval(), id2label={0: "iron", 1: "tin"}).save_pretrained(tmp_path)
    for name, label in (("tin", 1), ("0", 0)):
        loaded, found = styles.load_for_class(tmp_path, name)
        assert (found, loaded.config.num_classes) == (label, 2)
    out = tmp_path / "truncation.png"
    words = ["truncation", str(tmp_path), str(out), "--num-rows", "1", "--class-label", "tin"]
    monkeypatch.setattr(sys, "argv", ["interpolate", *words])
    interpolate.main()
    assert out.is_file()
    with pytest.raises(ValueError, match="--class-label has lead, but the model's"):
        styles.load_for_class(tmp_path, "lead")


def draw_z(seed, count):
    return torch.randn(count, 8, generator=make_generator(seed, stream="interpolation"))


@pytest.mark.parametrize(("fps", "duration"), [(24, 40), (10, 100), (60, 20), (3, 330)])
def test_a_gif_has_the_nearest_pace_that_it_can(tmp_path, fps, duration):
    images = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    files.save_video(images, tmp_path / "a.gif", fps)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.info["duration"] == duration


@pytest.mark.parametrize(
    ("command", "name"), [("walk", "a.avi"), ("mixing", "a.jpg"), ("truncation", "a.gif")]
)
def test_wrong_suffixes_are_refused_before_the_work(monkeypatch, command, name):
    monkeypatch.setattr(sys, "argv", ["", command, "no-such-model", name])
    with pytest.raises(ValueError, match="ends in"):
        interpolate.main()


def test_projection_of_a_micrograph_on_disk(model, tmp_path, monkeypatch, capsys):
    image = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_image(image, tmp_path / "a.png")
    out = tmp_path / "out"
    arguments = [
        "",
        str(tmp_path / "a.png"),
        str(model),
        "--out",
        str(out),
        "--num-steps",
        "2",
        "--row",
        "4",
        "--column",
        "9",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    project.main()
    facts = json.loads((out / "projection.json").read_text())
    assert json.loads(capsys.readouterr().out) == facts
    assert math.isfinite(facts["perceptual_distance"])
    picture = np.asarray(Image.open(out / "projection.png"))
    assert picture.shape == (32, 66)
    assert np.array_equal(picture[:, :32], to_uint8(image)[4:36, 9:41])
    found = load_file(out / "w.safetensors")
    assert found["w"].shape == (8,)
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], "30"])
    with pytest.raises(ValueError, match="choose --row and --column"):
        project.main()
    with pytest.raises(ValueError, match="holds no finished StyleGAN"):
        styles.load_pipeline(tmp_path)
