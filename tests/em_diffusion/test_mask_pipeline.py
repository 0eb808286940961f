"""The pipeline that draws micrographs for masks: its masks, its start, its windows, its files."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from em_data.micrograph import Defect
from em_diffusion import EMLatentDiffusionPipeline, EMMaskLatentDiffusionPipeline
from em_diffusion.mask_drawing import MaskLDMDrawer
from em_diffusion.mask_family import MaskLDMOptions
from em_diffusion.masks import widen_input
from em_diffusion.pipeline_em_mask_ldm import draw_masks, make_condition
from support.models import draw, make_ldm, make_mask_ldm

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def pipe():
    return make_mask_ldm()


def make_layout(x=2):
    """A dot and a loop beside it."""
    disc = np.hypot(*np.mgrid[-2:3, -2:3]) <= 2
    return [("loop", (x, 4, x + 5, 9), disc), ("dot", (x + 5, 5, x + 8, 8), np.ones((3, 3), bool))]


def test_an_untrained_mask_model_draws_the_images_of_the_model_that_it_starts_from():
    plain = make_ldm()
    pipe = make_mask_ldm(trained=False)
    pipe.guide = None
    with_masks = pipe(3, generators(0, 1, 2), mask=[make_layout()], output_type="np").images
    plain = EMLatentDiffusionPipeline(
        plain.vqvae, plain.unet, plain.scheduler, None, 3, plain.grain
    )
    plain.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(with_masks, draw(plain, 0, 1, 2), atol=1e-5)


def test_widened_input_keeps_the_other_weights():
    unet = make_ldm().unet
    wide = widen_input(unet, 7)
    assert wide.config.in_channels == unet.config.in_channels + 7
    assert wide.config.out_channels == unet.config.out_channels
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        expected = unet(x, t).sample
        got = wide(torch.cat([x, torch.randn(2, 7, 8, 8)], dim=1), t).sample
    torch.testing.assert_close(got, expected)
    wide.conv_in.weight.data += 1
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t).sample, expected)


def test_masks_have_a_channel_a_kind_and_one_of_contacts():
    kinds = ("dot", "loop")
    masks = draw_masks(make_layout(), kinds, 16, 12)
    assert masks.shape == (3, 16, 12)
    assert masks[0].sum() == 9
    assert masks[1].sum() == 13
    ys, xs = np.nonzero(masks[2].numpy())
    assert set(xs.tolist()) == {6, 7}  # the columns beside the edge between loop and dot
    assert len(ys) > 2
    alone = draw_masks(make_layout()[:1], kinds, 16, 12)
    assert not alone[2].any()
    twice = draw_masks(make_layout()[:1] * 2, kinds, 16, 12)
    assert torch.equal(twice[2], twice[1])
    as_defects = [Defect(*each) for each in make_layout()]
    assert torch.equal(draw_masks(as_defects, kinds, 16, 12), masks)
    box = draw_masks([Defect("dot", (0, 0, 3, 2))], kinds, 16, 12)
    assert box[0].sum() == 6


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (("void", (0, 0, 2, 2), None), "a defect is a void, but this model knows dot, loop"),
        (("dot", (-1, 0, 2, 2), None), "which is not inside the image of 16 x 16"),
        (("dot", (0, 0, 17, 2), None), "which is not inside the image of 16 x 16"),
        (("dot", (0, 0, 2, 2), np.ones((3, 2), bool)), r"the shape \(3, 2\), but its box \(2, 2\)"),
    ],
)
def test_wrong_layouts_are_refused(defect, message):
    with pytest.raises(ValueError, match=message):
        draw_masks([defect], ("dot", "loop"), 16, 16)


def test_a_latent_sees_all_pixels_that_it_covers():
    masks = torch.rand(2, 3, 16, 16)
    condition = make_condition(masks, 2)
    assert condition.shape == (2, 13, 8, 8)
    assert torch.equal(condition[:, 4:8, 3, 5], masks[:, 1, 6:8, 10:12].flatten(1))
    assert (condition[:, -1] == 1).all()


def test_a_layout_as_a_list_and_as_masks_give_the_same_image(pipe):
    masks = draw_masks(make_layout(), pipe.kinds, 16, 16)[None]
    first = pipe(1, generators(0), mask=[make_layout()], output_type="np")
    for mask in (masks, masks.numpy(), masks.bool(), masks.expand(2, -1, -1, -1)):
        again = pipe(None, generators(*range(len(mask))), mask=mask, output_type="np")
        np.testing.assert_allclose(again.images[:1], first.images, atol=1e-5)
        assert torch.equal(again.masks[:1], masks)
        assert again.layouts is None
    assert [kind for kind, _, _ in first.layouts[0]] == ["loop", "dot"]
    other = pipe(1, generators(0), mask=[make_layout(8)], output_type="np").images
    assert np.abs(other - first.images).max() > 1e-3
    without = masks[:, :-1]  # contacts of different kinds are found
    assert torch.equal(pipe(1, generators(0), mask=without, output_type="np").masks, masks)


def test_without_masks_layouts_are_drawn_and_told(pipe):
    drawn = pipe(3, generators(0, 1, 2), output_type="np")
    assert len(drawn.layouts) == 3
    assert any(map(len, drawn.layouts))
    again = pipe(1, generators(1), output_type="np")
    np.testing.assert_allclose(again.images, drawn.images[1:2], atol=1e-5)
    assert torch.equal(again.masks, drawn.masks[1:2])
    images, masks, layouts = pipe(2, generators(0, 1), output_type="np", return_dict=False)
    np.testing.assert_allclose(images, drawn.images[:2], atol=1e-5)
    assert torch.equal(masks, drawn.masks[:2])
    assert len(layouts) == 2


def test_an_image_and_a_mask_go_together(pipe):
    images = pipe(2, generators(0, 1), output_type="np").images
    masks = torch.zeros(1, 2, 16, 16)
    again = pipe(generator=generators(2, 3), image=images, strength=0.6, mask=masks)
    assert len(again.images) == len(again.masks) == 2
    drawn = pipe(generator=generators(2, 3), image=images, strength=0.6)
    assert len(drawn.layouts) == 2


def test_guidance_steps_away_from_the_dropped_mask(pipe):
    plain = pipe(2, generators(0, 1), mask=[make_layout()], output_type="latent").images
    one = pipe(2, generators(0, 1), mask=[make_layout()], output_type="latent", mask_scale=1.0)
    assert torch.equal(one.images, plain)
    guided = [
        pipe(2, generators(0, 1), mask=[make_layout()], output_type="latent", mask_scale=s).images
        for s in (0.0, 2.0)
    ]
    other = pipe(2, generators(0, 1), mask=[[]], output_type="latent", mask_scale=0.0).images
    assert torch.equal(guided[0], other)  # at 0, the mask has no effect
    assert (guided[1] - plain).abs().max() > 1e-3
    assert (guided[0] - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`mask_scale` is nan"):
        pipe(mask_scale=float("nan"))


def test_images_larger_than_a_tile_follow_their_masks(pipe):
    layout = [*make_layout(), *make_layout(30)]
    whole = pipe(1, generators(0), mask=[layout], height=24, width=40, output_type="np")
    assert whole.images.shape == (1, 24, 40, 1)
    assert whole.masks.shape == (1, 3, 24, 40)
    same = pipe(1, generators(0), mask=whole.masks, output_type="np")
    np.testing.assert_array_equal(same.images, whole.images)
    moved = pipe(1, generators(0), mask=[make_layout()], height=24, width=40, output_type="np")
    change = np.abs(moved.images - whole.images)[0, :, :, 0].max(axis=0)
    assert change[30:].max() > 1e-3
    assert change[:8].max() < 1e-6 or change[:8].max() < change[30:].max()
    drawn = pipe(1, generators(0), height=24, width=40, output_type="np")
    assert drawn.masks.shape == (1, 3, 24, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.zeros(1, 5, 16, 16)}, "5 channels, but this model has 2 kinds, dot, loop"),
        ({"mask": torch.full((1, 2, 16, 16), 3.0)}, "values from 3 to 3"),
        ({"mask": torch.zeros(2, 16, 16)}, r"shape \(2, 16, 16\); give \[B, K, H, W\]"),
        (
            {"mask": torch.zeros(1, 2, 16, 16), "height": 32},
            "`height` is 32, but the masks have 16",
        ),
        ({"mask": torch.zeros(1, 2, 18, 15)}, "The nearest size is"),
        ({"mask": [[]] * 2, "batch_size": 3}, "2 masks for 3 images"),
        ({"mask": [[("dot", (12, 0, 20, 2), None)]]}, "not inside the image of 16 x 16"),
    ],
)
def test_wrong_masks_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**options)
    assert pipe(1, generators(0), output_type="np").layouts is not None  # nothing is left behind


def test_a_saved_pipeline_draws_the_same_and_keeps_its_options(tmp_path):
    pipe = make_mask_ldm(mask_scale=1.5)
    expected = pipe(2, generators(0, 1), output_type="np")
    pipe.save_pretrained(tmp_path)
    loaded = EMMaskLatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.mask_scale == 1.5
    assert type(loaded)(**loaded.components).config.mask_scale == 1.5
    again = loaded(2, generators(0, 1), output_type="np")
    np.testing.assert_array_equal(again.images, expected.images)
    assert torch.equal(again.masks, expected.masks)
    copied = copy.copy(loaded)
    np.testing.assert_array_equal(
        copied(2, generators(0, 1), output_type="np").images, expected.images
    )
    with pytest.raises(ValueError, match="EMMaskLatentDiffusionPipeline"):
        EMLatentDiffusionPipeline.from_pretrained(tmp_path)


def test_the_published_file_stands_alone(tmp_path):
    make_mask_ldm().save_pretrained(tmp_path)
    text = (tmp_path / "pipeline_em_mask_ldm.py").read_text()
    assert "from .pipeline" not in text
    assert text.count("class EMLatentDiffusionPipeline(") == 1
    assert not (tmp_path / "pipeline_em_ldm.py").exists()
    compile(text, "pipeline_em_mask_ldm.py", "exec")


@pytest.mark.slow
def test_a_stranger_draws_the_same_images_for_masks(tmp_path):
    """In an interpreter without our packages, from a folder and from what it saved again."""
    pipe = make_mask_ldm()
    folder = tmp_path / "a.folder-with.dots"
    pipe.save_pretrained(folder)
    expected = pipe(2, generators(0, 1), output_type="np").images
    packages = [path for path in sys.path if path.endswith("site-packages")]
    script = Path(__file__).with_name("load_elsewhere.py")
    program = (
        f"import sys, runpy; sys.path += {packages!r}; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0])"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(script), str(folder), str(tmp_path)]
    result = subprocess.run(
        command, cwd=tmp_path, env={"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("first", "again"):
        images = np.load(tmp_path / f"images_{name}.npy")
        np.testing.assert_allclose(images, expected, atol=1e-5)
    first, again = (each / "pipeline_em_mask_ldm.py" for each in (folder, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


def test_remote_code_of_both_pipelines_lives_side_by_side(tmp_path, monkeypatch):
    plain, masked = make_ldm(), make_mask_ldm()
    plain.save_pretrained(tmp_path / "plain")
    masked.save_pretrained(tmp_path / "masked")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    loaded = {
        name: DiffusionPipeline.from_pretrained(tmp_path / name, trust_remote_code=True)
        for name in ("masked", "plain")
    }
    for each in loaded.values():
        each.set_progress_bar_config(disable=True)
        assert type(each).__module__.startswith("diffusers_modules.")
    np.testing.assert_allclose(draw(loaded["plain"], 0, 1), draw(plain, 0, 1), atol=1e-6)
    np.testing.assert_allclose(draw(loaded["masked"], 0, 1), draw(masked, 0, 1), atol=1e-6)


def test_images_with_and_without_grain_are_those_that_are_drawn_apart(pipe):
    numbers, options = [*range(20)], MaskLDMOptions(num_inference_steps=2)
    grainy, bare = MaskLDMDrawer(pipe, options).draw_both(numbers).split(1, dim=1)
    assert torch.equal(grainy, MaskLDMDrawer(pipe, options).draw(numbers))
    without = MaskLDMDrawer(pipe, replace(options, grain=False))
    assert torch.equal(bare, without.draw(numbers))
    assert not torch.equal(bare, grainy)
