"""Training with masks: what is seen, how it starts, resumes and ends, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from em_data import load_data
from em_diffusion import (
    PRESETS,
    EMLatentDiffusionPipeline,
    EMMaskLatentDiffusionPipeline,
    train,
    train_ldm,
)
from em_diffusion.mask_family import FAMILY
from em_diffusion.masks import MASK_SCALE, MaskedLatents, draw_conditions
from em_generation.generate import GenerationConfig, generate_images
from em_training import make_generator, make_image_rng
from em_training.family import EXACT_BATCH
from em_training.latents import Latents
from support.models import make_layout_sampler

UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The test preset with its micrographs cut once."""
    config = PRESETS["test"]()
    tiles = dataclasses.replace(
        config.tiles, cache_dir=str(tmp_path_factory.mktemp("cache")), downsample=2
    )
    return dataclasses.replace(config, tiles=tiles, precision="no")


@pytest.fixture(scope="module")
def source(config, tmp_path_factory):
    """A finished run without masks."""
    out = tmp_path_factory.mktemp("source") / "plain"
    return train_ldm(dataclasses.replace(config, out=str(out)))


def with_masks(config, source, out, **denoiser):
    """The configuration of a run with masks that starts from `source`."""
    autoencoder = dataclasses.replace(config.autoencoder, num_images=0)
    denoiser = {"num_images": 16, "checkpoint_every": 8, "mask_conditional": True} | denoiser
    return dataclasses.replace(
        config,
        out=str(out),
        init_from=str(source),
        autoencoder=autoencoder,
        denoiser=dataclasses.replace(config.denoiser, **denoiser),
    )


@pytest.fixture
def hide_labels(monkeypatch):
    """Let only the first `number` micrographs have labels."""

    def hide(number):
        def load(*arguments, **options):
            data = load_data(*arguments, **options)
            for each in data.train.cut.micrographs[number:]:
                each["defects"] = None
            return data

        monkeypatch.setattr(train, "load_data", load)

    return hide


def test_a_run_with_masks_draws_images_and_tells_their_layouts(
    config, source, tmp_path, hide_labels, capsys
):
    hide_labels(2)
    out = train_ldm(with_masks(config, source, tmp_path / "masked"))
    said = capsys.readouterr().out
    assert "training tiles have labels of the kinds dot, line, loop_100, loop_111" in said
    assert "layouts: measured on" in said
    record = json.loads((out / "run.json").read_text())
    assert record["family"] == FAMILY.name == "mask-ldm"
    assert record["started_from"]["denoiser"]["model"] == "plain"
    pipe = EMMaskLatentDiffusionPipeline.from_pretrained(out / "pipeline")
    assert pipe.kinds == ("dot", "line", "loop_100", "loop_111")
    assert pipe.layout_sampler.config.pixel_size_nm == pipe.config.pixel_size_nm == 2
    assert load_file(out / UNET)["conv_in.weight"][:, 4:].abs().max() > 0
    images = tmp_path / "images"
    generate_images(GenerationConfig(str(out), out=str(images), num_images=3, batch_size=4))
    assert len([*images.rglob("*.png")]) >= 3
    assert FAMILY.draws_layouts
    assert pipe.config.mask_scale == MASK_SCALE
    drawer = FAMILY.start(pipe, FAMILY.options(), seed=5, batch_size=16)
    numbers = [3, 0, 8]
    drawn, layouts = drawer.draw_layouts(numbers)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(3, [make_image_rng(5, i) for i in numbers], output_type="pt")
    torch.testing.assert_close(drawn, output.images * 2 - 1, atol=1e-4, rtol=0)
    for layout, expected in zip(layouts, output.layouts):
        assert [(each.kind, each.box_px) for each in layout] == [each[:2] for each in expected]
    again, same = drawer.draw_layouts([8] * EXACT_BATCH)
    torch.testing.assert_close(again[0], drawn[2], atol=1e-4, rtol=0)
    assert [each.box_px for each in same[0]] == [each.box_px for each in layouts[2]]
    frame = next(drawer.walk(1))
    torch.testing.assert_close(frame[0].mean(), drawer.draw([0])[0].mean(), atol=0.1, rtol=0)
    large = FAMILY.start(pipe, FAMILY.options(size="48x64", mask_scale=1.5), seed=5)
    assert large.draw_layouts([0])[0].shape == (1, 1, 48, 64)


def test_a_run_with_masks_begins_as_the_model_that_it_starts_from(config, source, tmp_path):
    """With a learning rate of nothing, images for any mask are those of the source."""
    still = {"learning_rate": 1e-30, "num_images": 8, "ema_half_life_images": 8, "guide_images": 0}
    out = train_ldm(with_masks(config, source, tmp_path / "still", **still))
    ours, theirs = (load_file(each / UNET) for each in (out, source))
    assert torch.equal(ours["conv_in.weight"][:, :4], theirs["conv_in.weight"])
    assert ours["conv_in.weight"][:, 4:].abs().max() < 1e-20
    masked = EMMaskLatentDiffusionPipeline.from_pretrained(out / "pipeline")
    plain = EMLatentDiffusionPipeline.from_pretrained(source / "pipeline")
    masks = torch.ones(1, 4, 32, 32)
    images = []
    for pipe, options in ((masked, {"mask": masks}), (plain, {})):
        pipe.set_progress_bar_config(disable=True)
        rngs = [torch.Generator().manual_seed(i) for i in range(2)]
        images.append(
            pipe(2, rngs, output_type="np", add_grain=False, num_inference_steps=3, **options)
        )
    np.testing.assert_allclose(images[0].images, images[1].images, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_masks_resumes_to_the_bit(config, source, tmp_path, monkeypatch):
    whole = train_ldm(with_masks(config, source, tmp_path / "whole"))
    parts = with_masks(config, source, tmp_path / "parts")
    conditions, calls = MaskedLatents.conditions, []

    def fail_once(self, ids):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return conditions(self, ids)

    monkeypatch.setattr(MaskedLatents, "conditions", fail_once)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        train_ldm(parts)
    assert not (tmp_path / "parts" / "run.json").exists()
    train_ldm(parts)
    assert (whole / UNET).read_bytes() == (tmp_path / "parts" / UNET).read_bytes()


def test_what_masks_need_is_said(config, source, tmp_path, hide_labels):
    without_start = with_masks(config, source, tmp_path / "a")
    denoiser = dataclasses.replace(without_start.denoiser, init_from=None)
    alone = dataclasses.replace(config, out=str(tmp_path / "b"), denoiser=denoiser)
    with pytest.raises(ValueError, match="use --init-from RUN"):
        train_ldm(alone)
    hide_labels(0)
    with pytest.raises(ValueError, match="no micrograph of the training side has labels"):
        train_ldm(without_start)


def test_masks_turn_with_the_tiles_and_some_are_dropped(config):
    data = load_data("synthetic", config.tiles, log=lambda text: None)
    sampler = make_layout_sampler()
    sampler.register_to_config(kinds=data.train.kinds)
    view_ids = np.arange(0, data.train.num_views, 5)
    latents = Latents(np.zeros((len(view_ids), 4, 16, 16), np.float16), [0.0] * 4, [1.0] * 4)
    masked = MaskedLatents(latents, data.train, view_ids, sampler)
    ids = torch.arange(12)
    conditions = masked.conditions(ids)
    assert conditions.shape == (12, masked.num_conditions, 16, 16)
    masks = F.pixel_shuffle(conditions[:, :-1], 2)
    assert torch.equal(masks[:, :-1], data.train.masks(view_ids[:12]))
    assert masks[:, :-1].sum() > 0
    assert (masks[:, -1] <= masks[:, :-1].amax(dim=1)).all()
    rng = make_generator(0, stream="test")
    dropped = draw_conditions(masked, torch.arange(12).repeat(20), 0.25, rng)
    is_dropped = (dropped == 0).all(dim=(1, 2, 3))
    assert 0.15 < is_dropped.float().mean() < 0.35
    assert (dropped[~is_dropped, -1] == 1).all()
    assert draw_conditions(latents, ids, 0.25, rng) is None
