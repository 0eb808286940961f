import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from em_commands import generate as command
from em_data import load_data, read_image_folder
from em_data.config import DataConfig
from em_data.files import lock, make_folder_name
from em_data.sources import open_source
from em_diffusion.drawing import LDMDrawer
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_generation.families import find_family
from em_generation.generate import GenerationConfig, generate_images, write_preview
from em_generation.loading import find_pipeline_folder, load_pipeline, read_model
from em_generation.sampling import draw_images
from em_generation.store import ArrowStore, FileStore, cut_into_shards
from em_stylegan.drawing import NOISE_MODE, StyleGANDrawer
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_training import seed_for
from support.models import make_ldm, make_stylegan

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["ldm", "stylegan2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (make_ldm() if request.param == "ldm" else make_stylegan()).save_pretrained(folder)
    return str(folder)


def family_of(model):
    return find_family("ldm" if "ldm" in Path(model).name else "stylegan")


def config_for(model, out, **changes):
    """A configuration; changes that are no fields of it are options of the model's family."""
    family, own = family_of(model), {field.name for field in fields(GenerationConfig)}
    options = {key: value for key, value in changes.items() if key not in own}
    if family.name == "ldm":
        options = {"num_inference_steps": 2} | options
    values = {"num_images": 7, "batch_size": 3, "precision": "no"}
    values |= {key: value for key, value in changes.items() if key in own}
    return GenerationConfig(str(model), str(out), options=family.options(**options), **values)


def read(folder):
    return np.stack(
        [np.asarray(Image.open(p), dtype=int) for p in sorted(Path(folder).glob("[0-9]*.png"))]
    )


def test_images_depend_on_seed_and_number_alone(model, tmp_path):
    for name, changes in {"a": {}, "b": {"batch_size": 7}, "c": {"seed": 1}}.items():
        generate_images(config_for(model, tmp_path / name, **changes))
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert len(a) == 7
    assert np.abs(a - b).max() <= 1  # another batch size may round another way
    assert len(np.unique(a.reshape(7, -1), axis=0)) == 7
    assert not np.array_equal(a, c)


def test_a_colour_generator_gives_the_mean_of_its_channels_and_says_so_once(tmp_path):
    torch.manual_seed(0)
    colour = StyleGAN2Generator(
        16, 3, z_dim=8, w_dim=8, mapping_depth=2, channel_base=64, max_channels=8
    )
    EMStyleGANPipeline(colour).save_pretrained(tmp_path / "colour")
    images, _, said, _ = sample(str(tmp_path / "colour"), range(5))
    generators = [torch.Generator().manual_seed(seed_for(0, i)) for i in range(5)]
    pipeline = load_pipeline(str(tmp_path / "colour"))
    expected = pipeline(5, generator=generators, noise_mode=NOISE_MODE, output_type="pt").images
    assert expected.shape == (5, 3, 16, 16)
    written = torch.stack([images[i] for i in range(5)])
    assert torch.allclose(written, expected.mean(dim=1, keepdim=True) * 2 - 1, atol=1e-4)
    assert said == ["the model makes 3-channel images; their mean is used"]
    generate_images(config_for(str(tmp_path / "colour"), tmp_path / "out", format="tiff", bits=16))
    assert len(list((tmp_path / "out").glob("*.tif*"))) == 7


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
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "generate.py",
        *flags,
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    assert np.abs(read(tmp_path / "one") - read(tmp_path / "two")).max() <= 1
    assert json.loads((tmp_path / "two" / "generation.json").read_text())["timed_images"] == 7


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


# ---------------------------------------------------------------- to the bit, whatever the batches


class RecordingStore:
    """Keeps what would be written, as float32, by number."""

    def __init__(self):
        self.images = {}

    def write(self, numbers, images):
        for number, image in zip(numbers, images, strict=True):
            assert number not in self.images  # no duplicate
            self.images[number] = image.clone()
        return len(images)


def start(model, **changes):
    """(drawer, configuration, what is said) as generate_images has them."""
    config, said = config_for(model, "unused", **changes), []
    drawer = family_of(model).start(
        load_pipeline(str(model)),
        config.options,
        seed=config.seed,
        batch_size=config.batch_size,
        say=said.append,
    )
    return drawer, config, said


def sample(model, numbers, **changes):
    """(images float32 by number, drawer, what is said, the batch size at the end)."""
    drawer, config, said = start(model, **changes)
    store, counts = RecordingStore(), []
    fits = draw_images(
        drawer,
        numbers,
        store.write,
        batch_size=config.batch_size,
        num_writers=2,
        progress=counts.append,
        say=said.append,
    )
    assert sum(counts) == len(numbers) == len(store.images)
    return store.images, drawer, said, fits


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_on_one_thread_the_batch_changes_no_bit_from_16_on(model, eta):
    if "ldm" not in Path(model).name:
        if eta:
            pytest.skip("a StyleGAN has no eta")
        check_batches(model)
    else:
        check_batches(model, eta=eta)


def check_batches(model, **options):
    whole, *_ = sample(model, range(40), batch_size=40, **options)
    for numbers, batch_size in (
        (range(40), 16),
        (range(40), 23),
        ([3, 17, 39], 32),
        (range(39, 20, -1), 20),
    ):
        part, *_ = sample(model, numbers, batch_size=batch_size, **options)
        assert all(torch.equal(part[i], whole[i]) for i in numbers)
    small, *_ = sample(model, range(6), batch_size=5, **options)
    for i, image in small.items():  # below 16 up to rounding; a code may be another, rarely
        assert (image - whole[i]).abs().median() < 1e-4


def test_decoding_apart_is_the_plain_call(tmp_path):
    pipeline = make_ldm()
    pipeline.save_pretrained(tmp_path / "ldm")
    pipeline.set_progress_bar_config(disable=True)
    for sizes in ({"batch_size": 20}, {"batch_size": 20, "decode_batch_size": 16}):
        images, drawer, *_ = sample(str(tmp_path / "ldm"), range(20), **sizes)
        assert drawer.decode_batch_size == sizes.get("decode_batch_size", 20)
        generators = [torch.Generator().manual_seed(seed_for(0, i)) for i in range(20)]
        for model in (pipeline.unet, pipeline.vqvae):
            model.to(memory_format=torch.channels_last)
        expected = pipeline(20, generators, 2, output_type="pt").images * 2 - 1
        assert all(torch.allclose(images[i], expected[i], atol=1e-6) for i in range(20))


def test_compiled_models_see_one_shape(tmp_path, monkeypatch):
    make_ldm().save_pretrained(tmp_path / "ldm")
    shapes, compiled = set(), []

    def compile(model, options=None):
        compiled.append(options)
        model.register_forward_pre_hook(lambda module, arguments: shapes.add(arguments[0].shape))
        return model

    monkeypatch.setattr(torch, "compile", compile)
    plain, *_ = sample(str(tmp_path / "ldm"), range(21), batch_size=8)
    padded, *_ = sample(str(tmp_path / "ldm"), range(21), batch_size=8, compile=True)
    assert compiled == [{"freezing": True}] * 2  # the U-Net and its guide
    assert shapes == {(8, 2, 8, 8)}
    assert all(torch.equal(plain[i], padded[i]) for i in range(21))


# ---------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError("none left"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_halves_the_batch_and_is_said_once(model, error, monkeypatch):
    whole, *_ = sample(model, range(40), batch_size=40)
    sizes = []
    cls = LDMDrawer if "ldm" in Path(model).name else StyleGANDrawer
    draw = cls.draw

    def limited(self, numbers):
        sizes.append(len(numbers))
        if len(numbers) > 17:
            raise error
        return draw(self, numbers)

    monkeypatch.setattr(cls, "draw", limited)
    images, _, said, fits = sample(model, range(40), batch_size=64)
    assert sizes == [40, 20, 10, 10, 10, 10]  # a batch of 10 is full: nothing is padded
    assert fits == 10
    assert said == ["out of memory: going on with --batch-size 10"]
    assert all(torch.allclose(images[i], whole[i], atol=1e-5) for i in range(40))


def test_out_of_memory_in_decoding_halves_the_decoders_batch(tmp_path, monkeypatch):
    make_ldm().save_pretrained(tmp_path / "ldm")
    whole, *_ = sample(str(tmp_path / "ldm"), range(20), batch_size=20)
    decode, sizes = EMLatentDiffusionPipeline.decode, []

    def limited(self, latents, *arguments):
        sizes.append(len(latents))
        images = decode(
            self, latents, *arguments
        )  # has drawn the grain when it fails: the next try draws the same
        if len(latents) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images

    monkeypatch.setattr(EMLatentDiffusionPipeline, "decode", limited)
    images, drawer, said, fits = sample(str(tmp_path / "ldm"), range(20), batch_size=20)
    assert sizes == [20, 10, 5, 5, 5, 5]
    assert (fits, drawer.decode_batch_size) == (20, 5)
    assert said == ["out of memory: going on with --decode-batch-size 5"]
    assert all(torch.allclose(images[i], whole[i], atol=1e-5) for i in range(20))


def test_one_image_that_does_not_fit_is_an_error_and_others_stay_themselves(tmp_path, monkeypatch):
    make_ldm().save_pretrained(tmp_path / "ldm")

    def fail(message):
        def raises(*arguments, **options):
            raise RuntimeError(message)

        return raises

    monkeypatch.setattr(EMLatentDiffusionPipeline, "denoise", fail("CUDA out of memory"))
    with pytest.raises(ValueError, match=r"one image by itself does not fit .* lower --precision"):
        sample(str(tmp_path / "ldm"), range(3))
    monkeypatch.setattr(EMLatentDiffusionPipeline, "denoise", fail("shapes differ"))
    with pytest.raises(ValueError, match=r"cannot be run \(RuntimeError: shapes differ\)"):
        sample(str(tmp_path / "ldm"), range(3))


def test_a_failing_disk_ends_the_run(model):
    drawer, *_ = start(model)

    def full(numbers, images):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        draw_images(drawer, range(20), full, batch_size=3)


# ---------------------------------------------------------------- where images go


@pytest.mark.parametrize("bits", [8, 16])
def test_arrow_holds_the_levels_of_the_files(model, tmp_path, bits, monkeypatch):
    import datasets
    import tifffile

    monkeypatch.setattr(
        "em_generation.store.cut_into_shards", lambda numbers: cut_into_shards(numbers, size=4)
    )
    options = {"bits": bits, "num_images": 11, "batch_size": 16}
    generate_images(config_for(model, tmp_path / "files", format="tiff", **options))
    record = generate_images(config_for(model, tmp_path / "arrow", format="arrow", **options))
    assert record["timed_images"] == 11
    expected = np.stack([tifffile.imread(tmp_path / "files" / f"{i:06d}.tif") for i in range(11)])
    dataset = datasets.load_from_disk(str(tmp_path / "arrow"))
    assert isinstance(dataset.features["image"], datasets.Image)
    assert dataset[0]["image"].mode == {8: "L", 16: "I;16"}[bits]
    assert dataset.with_format("numpy")[0]["image"].dtype == f"uint{bits}"
    np.testing.assert_array_equal(dataset.with_format("numpy")[:]["image"], expected)
    assert dataset["number"][:] == list(range(11))
    assert len(list((tmp_path / "arrow").glob("*.arrow"))) == 3
    images, files = read_image_folder(tmp_path / "arrow"), read_image_folder(tmp_path / "files")
    assert len(images) == len(files) == 11
    assert images.shape == files.shape
    assert torch.equal(images.batch(range(2, 11)), files.batch(range(2, 11)))
    # and as a source of micrographs, by the folder's name alone
    side = expected.shape[1]
    config = DataConfig(
        resolution=side, num_micrographs=None, downsample=1, cache_dir=str(tmp_path / "cache")
    )
    lines = []
    data = load_data(str(tmp_path / "arrow"), config, log=lines.append)
    num_left_out = "\n".join(lines).count("one grey level")  # untrained StyleGANs draw such images
    assert data.summary["num_micrographs"] + num_left_out == 11
    opened = open_source(str(tmp_path / "arrow"), config, None)
    assert len(opened.entries) == 11
    np.testing.assert_array_equal(opened.entries[3].read().image, expected[3])
    assert opened.entries[3].read().image.dtype == expected.dtype


def test_arrow_goes_on_after_a_kill_and_grows(model, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(
        "em_generation.store.cut_into_shards", lambda numbers: cut_into_shards(numbers, size=4)
    )
    config = config_for(model, tmp_path, format="arrow", num_images=10, batch_size=16)
    generate_images(config)

    def levels():
        dataset = datasets.load_from_disk(str(tmp_path)).with_format("numpy")[:]
        assert dataset["number"].tolist() == list(
            range(len(dataset["number"]))
        )  # no duplicate, no gap, in order
        return dataset["image"]

    whole, fingerprint = levels(), datasets.load_from_disk(str(tmp_path))._fingerprint
    (tmp_path / "images-000004-000008.arrow").unlink()
    (tmp_path / ".images-000004-000008.arrow.123").write_bytes(b"half")
    generate_images(config)
    np.testing.assert_array_equal(levels(), whole)
    assert not list(tmp_path.glob(".images*"))
    generate_images(replace(config, num_images=17))
    assert len(levels()) == 17
    np.testing.assert_array_equal(levels()[:10], whole)
    assert datasets.load_from_disk(str(tmp_path))._fingerprint != fingerprint
    with pytest.raises(ValueError, match="format, stored_as differ"):
        generate_images(replace(config, format="png"))


def test_shards_are_runs_within_blocks():
    assert cut_into_shards([0, 1, 2, 3, 4, 6, 9, 10], size=4) == [
        range(4),
        range(4, 5),
        range(6, 7),
        range(9, 11),
    ]
    assert cut_into_shards([]) == []


@pytest.mark.parametrize("format", ["png", "arrow"])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_what_is_missing_without_gap_or_duplicate(tmp_path, format, num_processes):
    make = (
        (lambda: ArrowStore(tmp_path, 8, None))
        if format == "arrow"
        else (lambda: FileStore(tmp_path, "png", 8, None))
    )
    missing = [i for i in range(1500) if i % 700 > 5]
    shares = [make().share(missing, rank, num_processes) for rank in range(num_processes)]
    assert sorted(number for share in shares for number in share) == missing
    assert max(map(len, shares)) - min(map(len, shares)) <= (256 if format == "arrow" else 1)


def test_a_scan_of_50000_files_takes_moments(tmp_path):
    import time

    for i in range(50_000):
        os.close(os.open(tmp_path / f"{i:06d}.png", os.O_CREAT))
    started = time.process_time()
    assert FileStore(tmp_path, "png", 8, None).find_missing(50_010) == list(range(50_000, 50_010))
    assert time.process_time() - started < 2


def test_images_with_and_without_grain_are_drawn_at_once(tmp_path, monkeypatch):
    """They equal those of two generations to the byte, also after a kill between the folders."""
    make_ldm().save_pretrained(tmp_path / "ldm")

    def make(name, grain=True, num_images=37):
        out = tmp_path / name
        sizes = {"num_images": num_images, "batch_size": 16}
        return config_for(tmp_path / "ldm", out, grain=grain, **sizes)

    def read_files(name):
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")}

    generate_images(make("grain"))
    generate_images(make("bare", False))
    draw, calls = LDMDrawer._denoise, []

    def count(self, rngs, *arguments, **options):
        calls.append(len(rngs))
        return draw(self, rngs, *arguments, **options)

    monkeypatch.setattr(LDMDrawer, "_denoise", count)
    generate_images(make("grain-2"), bare=make("bare-2", False))
    generate_images(make("bare-2", False))
    assert calls == [16, 16, 16]
    assert read_files("grain-2") == read_files("grain")
    assert read_files("bare-2") == read_files("bare")
    for name, of in (("grain-2", "grain"), ("bare-2", "bare")):
        records = [
            json.loads((tmp_path / each / "generation.json").read_text()) for each in (name, of)
        ]
        assert records[0]["settings"] == records[1]["settings"]
        assert records[0]["num_images"] == 37

    for folder, numbers in (("bare-2", (3, 5)), ("grain-2", (4, 5))):
        for number in numbers:
            (tmp_path / folder / f"{number:06d}.png").unlink()
    calls.clear()
    generate_images(make("grain-2"), bare=make("bare-2", False))
    generate_images(make("bare-2", False))
    assert calls == [16, 16, 16]  # number 5 for both, 4, 3; padded
    assert read_files("grain-2") == read_files("grain")
    assert read_files("bare-2") == read_files("bare")


def test_no_folder_is_made_for_a_model_without_grain(tmp_path):
    pipeline = make_ldm()
    pipeline.grain = None
    pipeline.save_pretrained(tmp_path / "ldm")
    config = config_for(tmp_path / "ldm", tmp_path / "images")
    bare = config_for(tmp_path / "ldm", tmp_path / "bare", grain=False)
    generate_images(config, bare=bare)
    assert len(read(tmp_path / "images")) == 7
    assert not (tmp_path / "bare").exists()


@pytest.mark.parametrize("options", [{"size": "8x9"}, {}])
def test_a_refused_generation_leaves_nothing(tmp_path, monkeypatch, options):
    def refuse(*images):
        raise ValueError("images are too bad in size")

    make_ldm().save_pretrained(tmp_path / "ldm")
    monkeypatch.setattr("em_generation.sampling.write_when_ready", refuse)  # without a wrong size
    out = tmp_path / "images" / "new"
    with pytest.raises(ValueError, match="size"):
        generate_images(config_for(tmp_path / "ldm", out, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["ldm"]
    out.mkdir(parents=True)
    with pytest.raises(ValueError, match="size"):
        generate_images(config_for(tmp_path / "ldm", out, **options))
    assert list(out.iterdir()) == []


def test_two_generations_in_one_folder_are_refused(model, tmp_path):
    with (
        lock(tmp_path / ".lock"),
        pytest.raises(ValueError, match="Another process generates into"),
    ):
        generate_images(config_for(model, tmp_path))
    generate_images(config_for(model, tmp_path, num_images=1))


@pytest.mark.parametrize("format", ["png", pytest.param("arrow", marks=pytest.mark.slow)])
def test_kills_leave_whole_images_and_the_rest_is_filled_in(tmp_path, format):
    """kill -9 in the middle, then two processes, then one: equal to one run, to the bit."""
    import datasets

    make_ldm().save_pretrained(tmp_path / "ldm")
    flags = [
        "--model",
        tmp_path / "ldm",
        "--num-images",
        "1200",
        "--batch-size",
        "16",
        "--precision",
        "no",
        "--format",
        format,
        "--num-inference-steps",
        "2",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "generate.py", "--out", tmp_path / "killed", *flags]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *command[1:],
    ]

    def count():
        names = [
            path.name
            for path in (tmp_path / "killed").glob("[!.]*")
            if path.suffix in (".png", ".arrow")
        ]
        return len(names)

    reached = 0
    for arguments in (command, command):
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and count() <= reached:
            pass
        assert process.poll() is None, "it came to its end before it was killed"
        process.kill()
        process.wait()
        assert count() > reached  # nothing is lost
        reached = count()
    subprocess.run(
        torchrun, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300
    )
    subprocess.run(
        [sys.executable, "generate.py", "--out", tmp_path / "whole", *flags],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    if format == "arrow":
        killed, whole = (
            datasets.load_from_disk(str(tmp_path / name)).with_format("numpy")[:]
            for name in ("killed", "whole")
        )
        assert killed["number"].tolist() == list(range(1200))
        np.testing.assert_array_equal(killed["image"], whole["image"])
    else:
        assert len(read(tmp_path / "killed")) == 1200
        np.testing.assert_array_equal(read(tmp_path / "killed"), read(tmp_path / "whole"))
        assert not list((tmp_path / "killed").glob(".0*"))
    assert json.loads((tmp_path / "killed" / "generation.json").read_text())["num_images"] == 1200


def test_the_preview_lies_beside_the_images_and_is_none_of_them(tmp_path):
    make_stylegan().save_pretrained(tmp_path / "stylegan2")
    for form in ("png", "arrow"):
        out = tmp_path / form / "images"
        generate_images(config_for(tmp_path / "stylegan2", out, num_images=5, format=form))
        path = write_preview(out)
        assert path == tmp_path / form / "images-preview.png"
        with Image.open(path) as picture:
            # 3 by 2 of 16 pixels, gaps of 2, enlarged, and the strip of the scale bar
            assert picture.size == (520, 340 + 36)
        assert len(read_image_folder(out)) == 5


def test_images_of_a_diverged_model_are_refused(tmp_path):
    pipeline = make_stylegan()
    with torch.no_grad():
        next(pipeline.generator.synthesis_network.parameters()).fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "stylegan2")
    with pytest.raises(ValueError, match=r"not finite.*diverged"):
        generate_images(config_for(tmp_path / "stylegan2", tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_full_disk_is_a_sentence_and_a_closed_output_changes_nothing(tmp_path, monkeypatch):
    import errno

    make_stylegan().save_pretrained(tmp_path / "stylegan2")
    config = config_for(tmp_path / "stylegan2", tmp_path / "out")

    def full(self, numbers, images):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(FileStore, "write", full)
        with pytest.raises(OSError, match=r"out cannot be written.*saved before is whole"):
            generate_images(config)

    flags = ["--model", config.model, "--out", config.out, "--num-images", "7", "--precision", "no"]
    process = subprocess.Popen(
        [sys.executable, "generate.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 7


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


def test_a_narrow_preview_is_enlarged(tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    with Image.open(write_preview(tmp_path)) as preview:
        assert preview.size == (512, 512)


def test_the_precision_of_the_launcher_is_used(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert GenerationConfig("model", "out").dtype == torch.bfloat16
    assert GenerationConfig("model", "out", precision="no").dtype == torch.float32
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("em_training.precision.default_precision", lambda: "no")
    assert GenerationConfig("model", "out").dtype == torch.float32
