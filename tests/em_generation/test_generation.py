import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from em_commands import generate as command
from em_data.files import make_folder_name
from em_generation.families import find_family
from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import find_pipeline_folder, load_pipeline, read_model
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_training import seed_for
from support.commands import TORCHRUN
from support.generation import config_for, read
from support.models import make_ldm, make_stylegan
from support.nodes import Nodes

ROOT = Path(__file__).parents[2]


def test_images_depend_on_seed_and_number_alone(model, tmp_path):
    for name, changes in {"a": {}, "b": {"batch_size": 7}, "c": {"seed": 1}}.items():
        generate_images(config_for(model, tmp_path / name, **changes))
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert len(a) == 7
    assert np.abs(a - b).max() <= 1  # another batch size may round another way
    assert len(np.unique(a.reshape(7, -1), axis=0)) == 7
    assert not np.array_equal(a, c)


def test_the_grain_is_that_of_the_pipelines_own_call_and_can_be_left_out(tmp_path):
    make_ldm().save_pretrained(tmp_path / "ldm")
    pipeline = load_pipeline(str(tmp_path / "ldm"))
    pipeline.set_progress_bar_config(disable=True)
    for grain in (True, False):
        config = config_for(
            tmp_path / "ldm", tmp_path / str(grain), num_images=16, batch_size=16, grain=grain
        )
        settings = generate_images(config)["settings"]
        assert settings["grain"] is grain
        generators = [torch.Generator().manual_seed(seed_for(0, i)) for i in range(16)]
        images = pipeline(16, generators, 2, output_type="np", add_grain=grain).images
        assert np.abs(read(tmp_path / str(grain)) - (images[..., 0] * 255).round()).max() <= 1
    with pytest.raises(ValueError, match="grain differs"):
        generate_images(config_for(tmp_path / "ldm", config.out, num_images=16, batch_size=16))
    difference = read(tmp_path / "True") - read(tmp_path / "False")
    assert (
        5 < difference.std() < 50
    )  # of 0.1 to 0.2 of half the range, 13 to 26 grey levels, times 0.5 to 2


def test_options_of_the_other_family_are_refused(model, tmp_path):
    """By the command with a sentence, and by the function, which takes its own family's alone."""
    is_ldm = "ldm" in Path(model).name
    given = ["--truncation-psi", "0.7", "--mix-seed=1"] if is_ldm else ["--eta=1", "--no-grain"]
    message = (
        "--mix-seed, --truncation-psi: only models of the family StyleGAN2 have this option"
        if is_ldm
        else "--eta, --no-grain: only models of the family LDM have this option"
    )
    flags = ["--model", model, "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        command.parse([*flags, *given])
    config, found = command.parse([*flags, "--num-images", "3"])
    assert (config.num_images, config.options) == (3, found.family.options())
    others = find_family("stylegan" if is_ldm else "ldm").options()
    with pytest.raises(ValueError, match="and takes"):
        generate_images(replace(config, options=others))


def test_help_shows_the_options_of_the_models_family(model, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--model", model, "--help"])
    text = capsys.readouterr().out
    is_ldm = "ldm" in Path(model).name
    assert ("--num-inference-steps" in text, "--truncation-psi" in text) == (is_ldm, not is_ldm)
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    text = capsys.readouterr().out
    assert "--num-images" in text
    assert "--truncation-psi" not in text


def test_images_of_classes(tmp_path):
    torch.manual_seed(0)
    generator = StyleGAN2Generator(
        16, z_dim=8, w_dim=8, mapping_depth=2, channel_base=64, max_channels=8, num_classes=3
    )
    pipeline = EMStyleGANPipeline(generator.eval(), id2label={0: "iron", 1: "1", 2: "tin"})
    pipeline.save_pretrained(tmp_path / "stylegan2")

    def draw(name, *classes):
        config = config_for(tmp_path / "stylegan2", tmp_path / name, classes=classes)
        record = generate_images(config)["settings"]
        assert record["classes"] == (list(classes) or "drawn at random")
        return read(tmp_path / name)

    def expect(labels):
        rngs = [torch.Generator().manual_seed(seed_for(0, i)) for i in range(7)]
        return pipeline(7, rngs, class_labels=labels, output_type="np").images[..., 0] * 255

    tin, mixed, free = draw("tin", "tin"), draw("mixed", "tin", "0"), draw("free")
    assert np.abs(tin - expect("tin").round()).max() <= 1
    assert np.abs(mixed - expect([2, "iron"] * 3 + [2]).round()).max() <= 1
    np.testing.assert_array_equal(mixed[::2], tin[::2])  # an image depends on its number and class
    assert not np.array_equal(mixed[1::2], tin[1::2])
    # without a choice each image draws its class, after z and before its noise
    assert np.abs(free - expect(None).round()).max() <= 1
    with pytest.raises(ValueError, match="classes differs"):
        generate_images(config_for(tmp_path / "stylegan2", tmp_path / "tin", classes=("iron",)))
    with pytest.raises(ValueError, match="--classes has lead, but the model's classes are 1, iron"):
        draw("lead", "lead")


def test_a_model_without_classes_takes_none(tmp_path):
    make_stylegan().save_pretrained(tmp_path / "stylegan2")
    with pytest.raises(ValueError, match="--classes is tin, but the model has no classes"):
        generate_images(config_for(tmp_path / "stylegan2", tmp_path / "out", classes=("tin",)))


def test_a_second_start_fills_the_gaps_and_only_those(model, tmp_path):
    config = config_for(model, tmp_path)
    generate_images(config)
    before = read(tmp_path)
    (tmp_path / "000002.png").unlink()
    (tmp_path / "000006.png").unlink()
    kept = (tmp_path / "000001.png").stat().st_mtime_ns
    record = generate_images(config)
    assert np.abs(read(tmp_path) - before).max() <= 1
    assert (tmp_path / "000001.png").stat().st_mtime_ns == kept
    assert record["timed_images"] == 9
    assert record["num_images"] == 7
    assert record == json.loads((tmp_path / "generation.json").read_text())
    assert generate_images(replace(config, num_images=8))["num_images"] == len(read(tmp_path)) == 8


def test_two_processes_make_the_same_folder(model, tmp_path):
    config = config_for(model, tmp_path / "one", batch_size=4)
    generate_images(config)
    flags = [
        "--model",
        model,
        "--out",
        str(tmp_path / "two"),
        "--num-images",
        "7",
        "--batch-size",
        "4",
        "--precision",
        "no",
    ]
    if "ldm" in Path(model).name:
        flags += ["--num-inference-steps", "2"]
    command = [*TORCHRUN, "generate.py", *flags]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    assert np.abs(read(tmp_path / "one") - read(tmp_path / "two")).max() <= 1
    assert json.loads((tmp_path / "two" / "generation.json").read_text())["timed_images"] == 7


@pytest.mark.parametrize(
    ("holds_others", "expected"),
    [
        pytest.param(False, "The nodes do not share the run folder", marks=pytest.mark.slow),
        (True, "process 1 on .*: images holds other files"),
    ],
)
def test_nodes_without_a_common_folder_are_refused(tmp_path, holds_others, expected):
    """Each of two nodes has a folder `images` of its own; in one of them lie other files."""
    make_stylegan().save_pretrained(tmp_path / "model")
    words = [str(ROOT / "generate.py"), "--model", str(tmp_path / "model"), "--out", "images"]
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    if holds_others:
        (folders[1] / "images").mkdir()
        (folders[1] / "images" / "theirs.txt").touch()
    nodes = Nodes([words, words], folders)
    assert nodes.wait() == [2, 2], nodes.texts
    assert re.search(expected, "".join(nodes.texts)), nodes.texts
    assert not (folders[0] / "images").exists()


def test_a_folder_never_mixes_settings_or_models(model, tmp_path):
    config = config_for(model, tmp_path / "images")
    generate_images(config)
    with pytest.raises(ValueError, match=r"other settings \(seed differs\)"):
        generate_images(replace(config, seed=3))
    if "ldm" in Path(model).name:
        with pytest.raises(ValueError, match=r"other settings \(grain differs\)"):
            generate_images(config_for(model, config.out, grain=False))
    other = tmp_path / "other"
    (make_ldm(1) if "ldm" in Path(model).name else make_stylegan(1)).save_pretrained(other)
    with pytest.raises(ValueError, match="weights_sha256"):
        generate_images(replace(config, model=str(other)))
    stray = tmp_path / "stray"
    stray.mkdir()
    Image.new("L", (16, 16)).save(stray / "000000.png")
    Image.new("L", (16, 16)).save(stray / "Chip-4.png")
    for name in ("000000.png", "Chip-4.png"):
        with pytest.raises(ValueError, match="stray holds other files; choose a new folder"):
            generate_images(replace(config, out=str(stray)))
        assert not [path for path in stray.iterdir() if path.suffix != ".png"]  # nothing written
        (stray / name).unlink()


def test_a_model_without_its_grain_is_another_model(tmp_path):
    """Also where the folder still holds what the index does not name."""
    pipeline = make_ldm()
    pipeline.save_pretrained(tmp_path / "ldm")
    with_grain = read_model(str(tmp_path / "ldm")).weights_sha256
    config = config_for(str(tmp_path / "ldm"), tmp_path / "images", num_images=2)
    generate_images(config)
    pipeline.grain = None
    pipeline.save_pretrained(tmp_path / "ldm")
    assert (tmp_path / "ldm" / "grain").exists()
    assert read_model(str(tmp_path / "ldm")).weights_sha256 != with_grain
    with pytest.raises(ValueError, match=r"weights_sha256, grain differ"):
        generate_images(config)


def test_sixteen_bit_tiff(model, tmp_path):
    import tifffile

    generate_images(config_for(model, tmp_path, num_images=2, format="tiff", bits=16))
    image = tifffile.imread(tmp_path / "000000.tif")
    assert image.dtype == np.uint16
    assert len(np.unique(image)) > 16


def test_another_scheduler_is_used(tmp_path):
    make_ldm().save_pretrained(tmp_path / "ldm")
    for scheduler in ("ddim", "dpm-solver++-karras", "unipc", "euler", "heun", "ddpm"):
        config = config_for(
            tmp_path / "ldm",
            tmp_path / scheduler,
            num_images=1,
            num_inference_steps=3,
            scheduler=scheduler,
        )
        record = generate_images(config)
        assert record["settings"]["scheduler"].lower().startswith(scheduler[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "must be 1 to 10000000"),
        ({"format": "gif"}, "png, tiff, arrow"),
        ({"bits": 12}, "8, 16"),
        ({"precision": "fp8"}, "precision"),
        ({"model": "runs/none"}, "no folder runs/none"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate_images(replace(GenerationConfig(model="x/y", out=str(tmp_path)), **changes))


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no finished model"):
        find_pipeline_folder(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30"}'
    )
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        load_pipeline(str(tmp_path))
    assert find_pipeline_folder("someone/em-ldm") is None
    assert find_pipeline_folder("someone/em-ldm@v1") is None
    with pytest.raises(ValueError, match="not a Hub id"):
        find_pipeline_folder("someone/em-ldm/v1")


def test_a_model_of_a_damaged_run_file_is_named(tmp_path):
    make_stylegan().save_pretrained(tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "run.json").write_text("")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        read_model(str(tmp_path / "run"))


def test_names_from_outside_become_safe_folders():
    assert make_folder_name("StyleGAN3-T") == "stylegan3-t"
    assert make_folder_name("my run") == "my-run"
    names = [
        make_folder_name(name) for name in ("../../etc", "/etc", "a/b", "a-b", "", "..", "a\nb")
    ]
    assert len(set(names)) == len(names)
    assert not any("/" in name or name.startswith(".") or not name for name in names)


def test_a_folder_of_images_is_no_model_and_tif_is_tiff(model, tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="holds images, not a run"):
        find_pipeline_folder(str(tmp_path))
    config, _ = command.parse(["--model", model, "--out", "x", "--format", "tif"])
    assert config.format == "tiff"


def test_the_precision_of_the_launcher_is_used(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert GenerationConfig("model", "out").dtype == torch.bfloat16
    assert GenerationConfig("model", "out", precision="no").dtype == torch.float32
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("em_training.precision.default_precision", lambda: "no")
    assert GenerationConfig("model", "out").dtype == torch.float32
