"""Images do not depend on the batch, whose size yields when memory is short."""

from pathlib import Path

import pytest
import torch

from em_diffusion.drawing import LDMDrawer
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_generation.generate import generate_images
from em_generation.loading import load_pipeline
from em_generation.sampling import draw_images
from em_stylegan.drawing import NOISE_MODE, StyleGANDrawer
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_training import seed_for
from support.generation import config_for, family_of
from support.models import make_ldm


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
