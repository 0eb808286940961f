"""Classes in the latent diffusion model: pipeline, drawing, training, guidance."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from em_diffusion import PRESETS, EMLatentDiffusionPipeline, posthoc_ema, train_ldm
from em_diffusion.choose_guidance import GuidanceConfig, choose_guidance
from em_diffusion.classes import check_classes, fit_classes
from em_diffusion.denoiser import create_denoiser, create_scheduler
from em_diffusion.denoiser_loop import (
    compute_denoising_loss,
    draw_classes,
    draw_validation_batch,
    evaluate_denoising,
    train_denoiser,
)
from em_diffusion.drawing import LDMDrawer
from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_diffusion.family import LDMOptions, list_controls
from em_diffusion.samplers import create_sampler, list_samplers
from em_training import make_generator
from em_training.latents import Latents, share_classes
from support.models import draw, make_conditional_ldm

sys.path.insert(0, str(Path(__file__).parent))
from test_loops import Killed, assert_same_run, kill_at

NAMES = ("copper", "steel", "tin")
DIFFUSION, FLOW = DDIMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()
CASES = [(base, name) for base in (DIFFUSION, FLOW) for name in list_samplers(base)]


@pytest.fixture
def pipe():
    """A tiny pipeline with three classes, whose guide has them, too; no grain."""
    pipe = make_conditional_ldm(NAMES)
    pipe.grain = None
    pipe.register_to_config(guidance_scale=1.0)
    return pipe


def denoise(pipe, **options):
    return pipe.denoise(3, [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)], **options)


class Fixed(torch.nn.Module):
    """A U-Net that is always asked for the same classes, or a mixture of two such predictions."""

    def __init__(self, pairs):
        super().__init__()
        self.pairs = pairs  # weight, U-Net, labels
        unet = pairs[0][1]
        self.config = SimpleNamespace(**unet.config | {"get": {}.get})
        self.dtype, self.device = unet.dtype, unet.device

    def forward(self, latents, timestep):
        parts = [w * m(latents, timestep, class_labels=c).sample for w, m, c in self.pairs]
        return SimpleNamespace(sample=sum(parts))


# --- the pipeline


@pytest.mark.parametrize(
    "labels",
    [
        [2, 0, 1],
        ["tin", "copper", "steel"],
        [2, "copper", 1],
        torch.tensor([2, 0, 1]),
        ("tin", 0, 1),
    ],
    ids=str,
)
def test_classes_are_named_or_numbered(pipe, labels):
    assert torch.equal(denoise(pipe, class_labels=labels), denoise(pipe, class_labels=[2, 0, 1]))
    assert pipe.labels == {"copper": 0, "steel": 1, "tin": 2}
    assert pipe.get_label_ids(["tin", "copper"]) == [2, 0]
    assert pipe.get_label_ids("steel") == [1]


def test_one_class_is_that_of_all_images(pipe):
    expected = denoise(pipe, class_labels=["steel"] * 3)
    for one in ("steel", 1, torch.tensor(1)):
        assert torch.equal(denoise(pipe, class_labels=one), expected)
    assert not torch.allclose(denoise(pipe, class_labels="tin"), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("gold", r"'gold'.*from 0 to 2, or a name: copper, steel, tin"),
        (["copper", "Steel", "tin"], r"'Steel'.*copper, steel, tin"),
        (3, "has 3, which is no class"),
        ([0, 1, -1], "has -1"),
        ([0, 1, None], "has None"),
        ([0, True, 1], "has True"),
        (torch.tensor([0.5, 1, 1]), "has 0.5"),
        ([0, 1], "2 `class_labels` for 3 images"),
    ],
    ids=str,
)
def test_a_wrong_class_is_refused_before_the_device_sees_it(pipe, labels, message):
    starts = mock.patch.object(pipe, "_prepare_latents", side_effect=AssertionError)
    with starts, pytest.raises(ValueError, match=message):
        denoise(pipe, class_labels=labels)
    with pytest.raises(ValueError, match="no class of this model; choose from copper, steel, tin"):
        pipe.get_label_ids("gold")


def test_without_a_class_the_null_class_is_drawn(pipe):
    with mock.patch.object(pipe.unet, "forward", wraps=pipe.unet.forward) as forward:
        denoise(pipe)
    for call in forward.call_args_list:
        assert call.kwargs["class_labels"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("base", [DIFFUSION, FLOW], ids=["diffusion", "flow"])
def test_guidance_1_is_the_plain_conditional_pass_to_the_bit(pipe, base):
    """The plain pass asks one U-Net for the classes; it knows nothing of guidance."""
    pipe.scheduler = create_sampler(list_samplers(base)[0], base)
    guided = denoise(pipe, class_labels=[2, 0, 1], guidance_scale=1)
    with mock.patch.object(pipe, "unet", Fixed([(1, pipe.unet, torch.tensor([2, 0, 1]))])):
        pipe.guide = None
        assert torch.equal(guided, denoise(pipe))


@pytest.mark.parametrize(
    ("base", "sampler"), CASES, ids=[f"{type(base).__name__[:4]} {name}" for base, name in CASES]
)
@pytest.mark.parametrize("has_guide", [True, False], ids=["guide", "null class"])
def test_the_prediction_is_guided_with_every_sampler(pipe, base, sampler, has_guide):
    """By the guide, which is asked for the same classes, or else by the null class."""
    pipe.scheduler = create_sampler(sampler, base)
    labels = torch.tensor([2, 0, 1])
    weaker = (pipe.guide, labels) if has_guide else (pipe.unet, torch.full((3,), 3))
    pipe.guide = pipe.guide if has_guide else None
    guided = denoise(pipe, class_labels=labels, guidance_scale=2.5)
    assert not torch.allclose(guided, denoise(pipe, class_labels=labels), atol=1e-2)
    mixture = Fixed([(-1.5, *weaker), (2.5, pipe.unet, labels)])
    pipe.guide = None
    with mock.patch.object(pipe, "unet", mixture):
        torch.testing.assert_close(guided, denoise(pipe), atol=1e-4, rtol=1e-4)


def test_images_of_no_class_are_guided_by_a_guide_alone(pipe):
    unguided = denoise(pipe)
    assert not torch.allclose(denoise(pipe, guidance_scale=2), unguided, atol=1e-2)
    pipe.guide = None
    pipe.register_to_config(guidance_scale=2.0)
    assert torch.equal(denoise(pipe), unguided)
    with pytest.raises(ValueError, match=r"guidance_scale` is 2.*give `class_labels`"):
        denoise(pipe, guidance_scale=2)
    assert not torch.allclose(
        denoise(pipe, class_labels=0), denoise(pipe, class_labels=0, guidance_scale=1), atol=1e-2
    )


def test_a_guide_without_classes_is_not_asked_for_them(pipe):
    kinds = {key: pipe.guide.config[key] for key in pipe.guide.config if key[0] != "_"}
    torch.manual_seed(8)
    pipe.guide = EMUNet2DModel(**kinds | {"num_class_embeds": None}).eval()
    assert torch.isfinite(denoise(pipe, class_labels=1, guidance_scale=2)).all()
    pipe.guide = EMUNet2DModel(**kinds | {"num_class_embeds": 9}).eval()
    with pytest.raises(ValueError, match="the guide has 8 classes, but the U-Net 3"):
        denoise(pipe, class_labels=1, guidance_scale=2)


@pytest.mark.parametrize("has_guide", [True, False], ids=["guide", "null class"])
def test_large_images_have_their_classes_in_every_window(pipe, has_guide):
    """Each image of a batch is that of its class alone, in windows of mixed batches."""
    pipe.guide = pipe.guide if has_guide else None
    options = {"height": 24, "width": 32, "guidance_scale": 2}
    together = denoise(pipe, class_labels=[2, 0, 1], **options)
    for i, (seed, name) in enumerate(zip((3, 4, 5), ("tin", "copper", "steel"))):
        rngs = [torch.Generator().manual_seed(seed)]
        alone = pipe.denoise(1, rngs, class_labels=name, window_batch_size=16, **options)
        assert torch.equal(together[i : i + 1], alone)


def test_a_model_without_classes_refuses_them(pipeline):
    assert (pipeline.num_classes, pipeline.labels) == (0, {})
    with pytest.raises(ValueError, match="this model has no classes"):
        denoise(pipeline, class_labels=0)
    with pytest.raises(ValueError, match="this model has no names"):
        pipeline.get_label_ids("copper")
    with pytest.raises(ValueError, match="the model has 0 classes"):
        EMLatentDiffusionPipeline(
            pipeline.vqvae, pipeline.unet, pipeline.scheduler, id2label={0: "copper"}
        )


@pytest.mark.parametrize(
    "names", [{0: "a", 1: "b"}, {0: "a", 1: "b", 3: "c"}, {0: "a", 1: "a", 2: "b"}]
)
def test_names_must_be_those_of_the_classes(pipe, names):
    with pytest.raises(ValueError, match="the model has 3 classes, counted from 0"):
        EMLatentDiffusionPipeline(pipe.vqvae, pipe.unet, pipe.scheduler, id2label=names)


def test_names_are_saved_and_kept(pipe, tmp_path):
    expected = draw(pipe, 1, 2, class_labels=["tin", "steel"])
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["id2label"] == {"0": "copper", "1": "steel", "2": "tin"}
    loaded = EMLatentDiffusionPipeline.from_pretrained(tmp_path)
    again = type(loaded)(**loaded.components)
    for each in (loaded, again):
        each.set_progress_bar_config(disable=True)
        assert each.labels == {"copper": 0, "steel": 1, "tin": 2}
        assert np.array_equal(draw(each, 1, 2, class_labels=["tin", "steel"]), expected)


def test_numbers_alone_do_without_names(pipe):
    del pipe.unet._pipeline_options
    unnamed = EMLatentDiffusionPipeline(pipe.vqvae, pipe.unet, pipe.scheduler)
    unnamed.set_progress_bar_config(disable=True)
    unnamed.register_to_config(default_num_inference_steps=3)
    assert torch.equal(denoise(unnamed, class_labels=1), denoise(pipe, class_labels="steel"))
    with pytest.raises(ValueError, match="give a number from 0 to 2\\."):
        denoise(unnamed, class_labels="steel")


def test_offload_and_bfloat16(pipe):
    options = {"class_labels": [2, 0, 1], "guidance_scale": 2}
    expected = denoise(pipe, **options)
    offloaded = make_conditional_ldm(NAMES)
    offloaded.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(denoise(offloaded, **options), expected, atol=1e-5, rtol=1e-5)
    pipe.to(torch.bfloat16)
    narrow = denoise(pipe, **options)
    assert (expected - narrow).abs().mean() < 0.2 * (expected - expected.flip(0)).abs().mean()


# --- drawing by numbers


def test_images_take_the_classes_in_turn(pipe):
    options = LDMOptions(classes=("tin", "0"), guidance_scale=1.5)
    drawer = LDMDrawer(pipe, options, seed=5, batch_size=16, say=print)
    together = drawer.draw(list(range(16)))
    assert drawer.describe()["classes"] == ["tin", "0"]
    for number, name in ((2, "tin"), (3, "copper")):
        alone = LDMDrawer(pipe, dataclasses.replace(options, classes=(name,)), seed=5, say=print)
        assert torch.equal(together[number], alone.draw([number] * 16)[0])
        assert torch.equal(together[number], drawer.draw([number] * 16)[0])
    frames = torch.cat(list(drawer.walk(2)))
    torch.testing.assert_close(frames, torch.cat(list(drawer.walk(2))))


def test_the_drawer_refuses_what_cannot_be(pipe):
    with pytest.raises(ValueError, match=r"--classes has gold, .* copper, steel, tin"):
        LDMDrawer(pipe, LDMOptions(classes=("gold",)), say=print)
    pipe.guide = None
    with pytest.raises(ValueError, match=r"--guidance-scale is 2.*name classes with --classes"):
        LDMDrawer(pipe, LDMOptions(guidance_scale=2.0), say=print)
    pipe.register_to_config(guidance_scale=2.0)
    assert "guidance_scale" not in LDMDrawer(pipe, LDMOptions(), say=print).describe()
    drawer = LDMDrawer(pipe, LDMOptions(classes=("tin",)), say=print)
    assert drawer.describe()["guidance_scale"] == 2.0


def test_the_demo_offers_classes(pipe, pipeline):
    control = list_controls(pipe)[0]
    assert control.name == "classes"
    assert list(control.choices) == ["none", "each in turn", *NAMES]
    assert control.choices["none"] == ()
    assert control.choices["tin"] == ("tin",)
    pipe.guide = None
    controls = {each.name: each for each in list_controls(pipe)}
    assert controls["classes"].sets == {"none": {"guidance_scale": 1.0}}
    assert "guidance_scale" in controls
    assert list_controls(pipeline)[0].name == "scheduler"


# --- training


def make_latents(num_views=24, seed=0, classes=None):
    rng = torch.Generator().manual_seed(seed)
    array = torch.randn(num_views, 4, 8, 8, generator=rng).half().numpy()
    classes = np.arange(num_views) % 3 if classes is None else classes
    return Latents(array, [0.0] * 4, [1.0] * 4, NAMES, classes)


def test_the_loss_is_that_of_the_classes(config):
    unet = create_denoiser(config.denoiser, 8, 4, num_classes=3)
    assert unet.config.num_class_embeds == 4
    scheduler = create_scheduler(config.denoiser)
    rng = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=rng) for _ in range(2))
    timesteps, labels = torch.tensor([10, 900]), torch.tensor([3, 1])
    losses = compute_denoising_loss(unet, scheduler, latents, noise, timesteps, labels)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, class_labels=labels).sample
    torch.testing.assert_close(losses, (predicted - noise).square().mean(dim=(1, 2, 3)))
    losses.mean().backward()
    reached = unet.class_embedding.weight.grad.abs().sum(dim=1) > 0
    assert reached.tolist() == [False, True, False, True]


def test_classes_are_dropped_by_what_was_seen(config):
    """A tenth of them, by the generator of that moment; unknown ones are always no class."""
    latents = make_latents(3000, classes=np.arange(3000) % 3 - 1)
    ids = np.arange(3000)
    first, again, other = (
        draw_classes(latents, ids, config.denoiser, make_generator(0, num_images_seen=seen))
        for seen in (64, 64, 128)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    known = torch.as_tensor(ids % 3 - 1)
    assert (first[known < 0] == 3).all()
    dropped = (first == 3)[known >= 0].float().mean()
    assert 0.08 < dropped < 0.12
    kept = first != 3
    assert torch.equal(first[kept], known[kept])
    plain = Latents(latents.array, [0.0] * 4, [1.0] * 4)
    assert plain.num_classes == 0
    assert plain.class_labels([0]) is plain.share_classes([0]) is None
    assert draw_classes(plain, ids, config.denoiser, make_generator(0)) is None


def test_first_images_share_the_classes_of_the_views():
    classes = torch.tensor([0] * 60 + [1] * 30 + [-1] * 50 + [2] * 10)
    shares = np.bincount(share_classes(classes, range(50)), minlength=3) / 50
    assert np.abs(shares - [0.6, 0.3, 0.1]).max() < 0.03
    assert share_classes(classes, [7]) == [share_classes(classes, range(8))[7]]


def test_validation_sees_the_true_classes(config, accelerator):
    batch = draw_validation_batch(make_latents(), config.denoiser)
    assert torch.equal(batch.class_labels, batch.ids % 3)
    unet = create_denoiser(config.denoiser, 8, 4, num_classes=3).eval()
    values = evaluate_denoising(
        unet, create_scheduler(config.denoiser), batch, accelerator, config.denoiser
    )
    losses = compute_denoising_loss(
        unet,
        create_scheduler(config.denoiser),
        batch.images,
        batch.noise,
        batch.timesteps,
        batch.class_labels,
    )
    torch.testing.assert_close(values["held_out_loss"], losses.mean())


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 3, "posthoc_ema_every": 24}])
def test_a_run_with_classes_resumes_to_the_bit(config, vqvae, accelerator, tmp_path, changes):
    stage = dataclasses.replace(config.denoiser, **changes)
    arguments = {"vqvae": vqvae, "accelerator": accelerator}
    latents, held_out = make_latents(), make_latents(6, seed=1)
    train_denoiser(stage, latents, held_out, **arguments, out_dir=tmp_path / "whole")
    restore = kill_at(latents, 6)
    with pytest.raises(Killed):
        train_denoiser(stage, latents, held_out, **arguments, out_dir=tmp_path / "parts")
    restore()
    train_denoiser(stage, latents, held_out, **arguments, out_dir=tmp_path / "parts")
    assert_same_run(tmp_path / "whole/denoiser", tmp_path / "parts/denoiser")


def test_parts_of_a_batch_have_their_classes(config, vqvae, accelerator, tmp_path):
    """Accumulated in parts, the weights are those of whole batches up to rounding."""
    arguments = {"vqvae": vqvae, "accelerator": accelerator}
    weights = []
    for size in (0, 3):
        stage = dataclasses.replace(config.denoiser, micro_batch_size=size, num_images=32)
        out = tmp_path / str(size)
        train_denoiser(stage, make_latents(), make_latents(6, 1), **arguments, out_dir=out)
        weights.append(load_file(out / "denoiser/unet/diffusion_pytorch_model.safetensors"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-3)


def test_a_trained_unet_gets_other_classes(config):
    """A class that it knows keeps its prediction; a new one, and none, begin as no class."""
    torch.manual_seed(0)
    plain = create_denoiser(config.denoiser, 8, 4).eval()
    x, t = torch.randn(4, 4, 8, 8), torch.tensor([10, 300, 600, 900])
    expected = plain(x, t).sample
    with_classes = fit_classes(plain, (), ("copper", "tin"))
    labels = torch.tensor([0, 1, 2, 2])
    assert torch.equal(with_classes(x, t, class_labels=labels).sample, expected)
    torch.nn.init.normal_(with_classes.class_embedding.weight)
    before = {i: with_classes(x, t, class_labels=torch.full((4,), i)).sample for i in range(3)}
    other = fit_classes(with_classes, ("copper", "tin"), ("steel", "tin", "zinc"))
    assert other.config.num_class_embeds == 4
    for new, old in ((0, 2), (1, 1), (2, 2), (3, 2)):
        now = other(x, t, class_labels=torch.full((4,), new)).sample
        assert torch.equal(now, before[old])
    none = fit_classes(other, ("steel", "tin", "zinc"), ())
    assert none.config.num_class_embeds is None
    torch.testing.assert_close(none(x, t).sample, before[2], atol=1e-5, rtol=1e-5)


# --- whole runs


def make_config(out, **changes):
    config = PRESETS["test"]()
    tiles = dataclasses.replace(
        config.tiles, num_synthetic=6, micrograph_size=128, held_out_fraction=0.5
    )
    denoiser = dataclasses.replace(
        config.denoiser, posthoc_ema_every=32, **changes.pop("denoiser", {})
    )
    changes = {"data": "synthetic-materials", "conditional": True} | changes
    return dataclasses.replace(
        config, out=str(out), precision="no", tiles=tiles, denoiser=denoiser, **changes
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with three classes, which measured images on the way."""
    out = tmp_path_factory.mktemp("classes") / "ldm"
    measured = {"evaluate_every": 32, "num_evaluation_images": 12, "num_evaluation_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out.parent / "cache"))
        yield train_ldm(make_config(out, denoiser=measured))


def test_a_run_names_its_classes(run, tmp_path):
    pipe = EMLatentDiffusionPipeline.from_pretrained(run / "pipeline")
    assert list(pipe.labels) == ["coarse-loops", "fine-loops", "lines"]
    assert json.loads((run / "data.json").read_text())["classes"] == list(pipe.labels)
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["classes"] == {"coarse-loops": 2, "fine-loops": 2, "lines": 2}
    posthoc_ema.make_posthoc_pipeline(run, 0.1, tmp_path / "finished")
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("unet", "run.json"))
    posthoc_ema.make_posthoc_pipeline(tmp_path / "run", 0.1, tmp_path / "unfinished")
    for name in ("finished", "unfinished"):
        made = EMLatentDiffusionPipeline.from_pretrained(tmp_path / name / "pipeline")
        assert made.labels == pipe.labels


@pytest.mark.parametrize("by", ["guide", "classes"])
def test_guidance_is_chosen_for_the_classes(run, tmp_path, by, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = GuidanceConfig(
        run=str(tmp_path / "run"), by=by, scales=(2.0,), num_images=12, batch_size=6
    )
    choose_guidance(config)
    pipe = EMLatentDiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.config.guidance_scale == 2
    assert (pipe.guide is not None) == (by == "guide")
    assert pipe.guide is None or pipe.guide.config.num_class_embeds == 4
    if by == "classes":
        pipe.set_progress_bar_config(disable=True)
        images = draw(pipe, 1, class_labels="lines")
        assert not np.array_equal(images, draw(pipe, 1, class_labels="lines", guidance_scale=1))
        shutil.rmtree(tmp_path / "run/denoiser/guide")
        with pytest.raises(ValueError, match=r"kept no guide.*Use --by classes"):
            choose_guidance(dataclasses.replace(config, by="guide"))


def test_a_run_goes_from_classes_to_none_and_back(run, tmp_path, capsys):
    """With a learning rate of nothing, the model without classes is that of no class."""
    still = {"learning_rate": 1e-30, "num_images": 8, "guide_images": 0, "ema_half_life_images": 8}
    denoiser = dataclasses.replace(PRESETS["test"]().denoiser, **still)
    fixed = {"autoencoder": dataclasses.replace(PRESETS["test"]().autoencoder, num_images=0)}

    def go_on(source, name, **changes):
        config = make_config(tmp_path / name, **fixed, init_from=str(source), **changes)
        return train_ldm(
            dataclasses.replace(
                config, denoiser=dataclasses.replace(denoiser, init_from=str(source))
            )
        )

    without = go_on(run, "without", conditional=False)
    assert "lines, which are not used. Train with --conditional" in capsys.readouterr().out
    back = go_on(without, "back")
    pipes = [
        EMLatentDiffusionPipeline.from_pretrained(each / "pipeline")
        for each in (run, without, back)
    ]
    assert [each.num_classes for each in pipes] == [3, 0, 3]
    for each in pipes:
        each.set_progress_bar_config(disable=True)
        each.grain = None
    expected = denoise(pipes[0])
    for each, options in ((pipes[1], {}), (pipes[2], {}), (pipes[2], {"class_labels": "lines"})):
        torch.testing.assert_close(denoise(each, **options), expected, atol=1e-3, rtol=1e-3)


def test_data_without_classes_are_refused():
    data = SimpleNamespace(train=SimpleNamespace(class_names=()))
    config = SimpleNamespace(conditional=True, data="here")
    with pytest.raises(ValueError, match="no micrograph of here has a class"):
        check_classes(config, data)
    config.conditional = False
    assert check_classes(config, data) is None
