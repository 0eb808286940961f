"""Original latent diffusion models: U-Nets that answer as a slow twin, their noise schedule, and
whole pipelines.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from em_diffusion import EMLatentDiffusionPipeline
from em_diffusion.autoencoder import encode
from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.load_official import main
from em_diffusion.original.load import load_official, load_official_unet
from em_diffusion.original.schedule import compute_betas, create_scheduler
from support import official_twins as twins
from support.official_twins import deviation

UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2, 4],
    "num_res_blocks": 1,
    "channel_mult": [1, 2, 4],
    "num_heads": 4,
}
CASES = {
    # name: (changes of the U-Net, the class that holds it)
    "fixed number of heads": ({}, EMUNet2DModel),
    "one head": ({"num_heads": 1}, EMUNet2DModel),
    "fixed width of heads": ({"num_heads": -1, "num_head_channels": 16}, UNet2DModel),
    "width before number": ({"num_heads": 8, "num_head_channels": 16}, UNet2DModel),
    "newer order of heads": ({"use_new_attention_order": True}, EMUNet2DModel),
    "newer order, fixed width": (
        {"num_heads": -1, "num_head_channels": 8, "use_new_attention_order": True},
        UNet2DModel,
    ),
    "scale and shift": ({"use_scale_shift_norm": True}, EMUNet2DModel),
    "residual resampling": ({"resblock_updown": True, "attention_resolutions": [2]}, EMUNet2DModel),
    "both, as in ADM": (
        {
            "resblock_updown": True,
            "use_scale_shift_norm": True,
            "num_heads": -1,
            "num_head_channels": 16,
        },
        UNet2DModel,
    ),
    "resampling without convolutions": ({"conv_resample": False}, EMUNet2DModel),
    "the same with fixed width": (
        {"conv_resample": False, "num_heads": -1, "num_head_channels": 16},
        EMUNet2DModel,
    ),
    "attention in the middle only": ({"attention_resolutions": []}, EMUNet2DModel),
    "attention on the finest level": ({"attention_resolutions": [1, 4]}, EMUNet2DModel),
    "two blocks": ({"num_res_blocks": 2, "channel_mult": [1, 3]}, EMUNet2DModel),
    "widths that fall": ({"channel_mult": [1, 4, 2]}, EMUNet2DModel),
    "one level": ({"channel_mult": [1], "attention_resolutions": [1]}, EMUNet2DModel),
}
FIRST_STAGE = {
    "embed_dim": 4,
    "n_embed": 40,
    "ddconfig": {
        "double_z": False,
        "z_channels": 4,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    },
}
PARAMS = {
    "linear_start": 0.0015,
    "linear_end": 0.0195,
    "timesteps": 1000,
    "image_size": 8,
    "channels": 4,
    "cond_stage_config": "__is_unconditional__",
    "first_stage_config": {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": FIRST_STAGE,
    },
}


def write(folder, unet_config, weights, params=PARAMS, name="model"):
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet_config}
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return twins.write_checkpoint(folder, weights, target, params | {"unet_config": unet}, name)


def raw(weights):
    return {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}


def averaged(weights):
    names = {
        f"model_ema.{('diffusion_model.' + name).replace('.', '')}": tensor
        for name, tensor in weights.items()
    }
    return names | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }


def buffers(betas):
    """The noise schedule as the original stores it beside the weights."""
    cumulative = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1), cumulative[:-1]])
    return {
        "betas": betas,
        "alphas_cumprod": cumulative,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": cumulative.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - cumulative).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - cumulative).log(),
        "sqrt_recip_alphas_cumprod": (1 / cumulative).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / cumulative - 1).sqrt(),
        "posterior_variance": betas * (1 - previous) / (1 - cumulative),
        "posterior_log_variance_clipped": torch.zeros(len(betas)),
        "posterior_mean_coef1": torch.ones(len(betas)),
        "posterior_mean_coef2": torch.ones(len(betas)),
        "logvar": torch.zeros(len(betas)),
    }


def as_double(weights):
    return {name: tensor.double() for name, tensor in weights.items()}


def noisy(size=8, channels=4):
    return torch.randn(
        2, channels, size, size + 4, generator=torch.Generator().manual_seed(1)
    ), torch.tensor([3, 871])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_answers_as_the_twin(tmp_path, case):
    changes, cls = CASES[case]
    config = UNET | changes
    weights = twins.random_unet(config)
    unet, _, _ = load_official_unet(write(tmp_path, config, raw(weights)))
    assert type(unet) is cls
    x, timesteps = noisy()
    expected = twins.unet(weights, config, x, timesteps)
    answer = unet(x, timesteps).sample
    assert deviation(answer, expected) < 1e-5
    # in float64 the two are one function
    expected = twins.unet(as_double(weights), config, x.double(), timesteps)
    assert deviation(unet.double()(x.double(), timesteps).sample, expected) < 1e-10
    assert (unet.config.sample_size, unet.config.in_channels) == (8, 4)


@torch.no_grad()
def test_the_stock_model_is_wrong_about_a_fixed_number_of_heads(tmp_path):
    """Eight heads, which are 32 wide on one level and 64 on the next: a strict load as heads of one
    width, and another function.
    """
    config = UNET | {"model_channels": 32, "channel_mult": [1, 8, 16], "num_heads": 8}
    weights = twins.random_unet(config)
    for name in weights:
        weights[name] *= (
            3 if name.endswith("qkv.weight") else 1
        )  # attention sharp enough to matter, as in trained models
    unet, _, _ = load_official_unet(write(tmp_path, config, raw(weights)))
    own = ("num_attention_heads", "resample_with_conv")
    stock = UNet2DModel.from_config(
        {k: v for k, v in unet.config.items() if k not in own} | {"attention_head_dim": 32}
    )
    stock.load_state_dict(unet.state_dict(), strict=True)
    x, timesteps = noisy(4)
    expected = twins.unet(as_double(weights), config, x.double(), timesteps)
    assert deviation(unet.double()(x.double(), timesteps).sample, expected) < 1e-9
    assert deviation(stock.eval().double()(x.double(), timesteps).sample, expected) > 0.05


@torch.no_grad()
def test_averaged_and_raw_weights(tmp_path):
    weights, average = twins.random_unet(UNET), twins.random_unet(UNET, seed=5)
    path = write(tmp_path, UNET, raw(weights) | averaged(average))
    x, timesteps = noisy()
    expected = {
        False: twins.unet(weights, UNET, x, timesteps),
        True: twins.unet(average, UNET, x, timesteps),
    }
    for use_ema in (None, True, False):
        unet, _, _ = load_official_unet(path, use_ema=use_ema)
        assert deviation(unet(x, timesteps).sample, expected[use_ema is not False]) < 1e-5
    only_averages = write(tmp_path, UNET, averaged(average), name="averages")
    assert (
        deviation(load_official_unet(only_averages)[0](x, timesteps).sample, expected[True]) < 1e-5
    )
    only_raw = write(tmp_path, UNET, raw(weights), name="raw")
    with pytest.raises(ValueError, match="holds no averaged weights"):
        load_official_unet(only_raw, use_ema=True)
    incomplete = averaged(average)
    del incomplete["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ValueError, match=r"has no model_ema\.diffusion_modelout2bias"):
        load_official_unet(write(tmp_path, UNET, raw(weights) | incomplete, name="incomplete"))


def test_half_precision_weights_are_read_as_float32(tmp_path):
    weights = {name: tensor.half() for name, tensor in twins.random_unet(UNET).items()}
    unet, _, _ = load_official_unet(write(tmp_path, UNET, raw(weights)))
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


# ---------------------------------------------------------------- noise schedule


SCHEDULE = {
    "timesteps": 1000,
    "beta_schedule": "linear",
    "start": 0.0015,
    "end": 0.0195,
    "cosine_s": 8e-3,
}
SCHEDULER = SCHEDULE | {"prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        (
            "linear",
            lambda i: (math.sqrt(0.0015) + i / 999 * (math.sqrt(0.0195) - math.sqrt(0.0015))) ** 2,
        ),
        ("sqrt_linear", lambda i: 0.0015 + i / 999 * (0.0195 - 0.0015)),
        ("sqrt", lambda i: math.sqrt(0.0015 + i / 999 * (0.0195 - 0.0015))),
        (
            "cosine",
            lambda i: min(
                1
                - math.cos(((i + 1) / 1000 + 8e-3) / 1.008 * math.pi / 2) ** 2
                / math.cos((i / 1000 + 8e-3) / 1.008 * math.pi / 2) ** 2,
                0.999,
            ),
        ),
    ],
)
def test_schedules_by_their_formulas(name, formula):
    scheduler = create_scheduler(**SCHEDULER | {"beta_schedule": name})
    for i in (0, 1, 500, 998, 999):
        assert float(scheduler.betas[i]) == pytest.approx(formula(i), rel=1e-5)


def test_round_trip_of_a_schedule_without_a_name(tmp_path):
    scheduler = create_scheduler(**SCHEDULER | {"beta_schedule": "cosine"})
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(DDIMScheduler.from_pretrained(tmp_path).betas, scheduler.betas)


@pytest.mark.parametrize(
    ("parameterization", "name"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
def test_what_the_unet_predicts(tmp_path, parameterization, name):
    params = PARAMS | {"parameterization": parameterization}
    _, scheduler, _ = load_official_unet(
        write(tmp_path, UNET, raw(twins.random_unet(UNET)), params)
    )
    assert scheduler.config.prediction_type == name
    assert scheduler.config.clip_sample is False


def test_stored_schedule_is_used_where_it_differs(tmp_path):
    weights = raw(twins.random_unet(UNET))
    betas = torch.from_numpy(compute_betas(**SCHEDULE)).float()
    _, scheduler, _ = load_official_unet(write(tmp_path, UNET, weights | buffers(betas)))
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.trained_betas is None
    _, scheduler, _ = load_official_unet(write(tmp_path, UNET, weights | buffers(betas * 0.9)))
    torch.testing.assert_close(scheduler.betas, betas * 0.9)
    with pytest.raises(ValueError, match="has 500 steps, the yaml's 1000"):
        load_official_unet(write(tmp_path, UNET, weights | buffers(betas[:500])))
    with pytest.raises(ValueError, match="outside of"):
        load_official_unet(write(tmp_path, UNET, weights | {"betas": -betas}))


def sample_by_the_original_ddim(predict, betas, x, num_steps, eta, noises):
    """DDIM over every (T / n)-th timestep from 1 on; the last step goes to the first timestep's
    noise.
    """
    signal = torch.cumprod(1 - betas, 0)
    steps = torch.arange(0, len(betas), len(betas) // num_steps) + 1
    for i in reversed(range(num_steps)):
        a, before = signal[steps[i]], signal[steps[i - 1]] if i else signal[0]
        sigma = eta * ((1 - before) / (1 - a) * (1 - a / before)).sqrt()
        noise = predict(x, steps[i])
        clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
        x = before.sqrt() * clean + (1 - before - sigma**2).sqrt() * noise + sigma * noises[i]
    return x


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_takes_the_originals_steps(tmp_path, eta):
    weights = twins.random_unet(UNET)
    unet, scheduler, _ = load_official_unet(write(tmp_path, UNET, raw(weights)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    noises = torch.randn(5, 1, 4, 8, 8, generator=generator)
    betas = torch.from_numpy(compute_betas(**SCHEDULE))
    expected = sample_by_the_original_ddim(
        lambda z, t: twins.unet(weights, UNET, z.float(), t[None]).double(),
        betas,
        x.double(),
        5,
        eta,
        noises.double(),
    )
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    for i, t in zip(reversed(range(5)), scheduler.timesteps):
        x = scheduler.step(unet(x, t).sample, t, x, eta=eta, variance_noise=noises[i]).prev_sample
    assert deviation(x, expected) < 1e-4


# ---------------------------------------------------------------- pipelines


def whole_model(folder, params=PARAMS, kind="VQ", extra=(), **options):
    unet_weights = twins.random_unet(UNET)
    first_stage = params["first_stage_config"]["params"]
    autoencoder = twins.random_taming(kind, first_stage, seed=3)
    weights = raw(unet_weights) | {
        f"first_stage_model.{name}": tensor for name, tensor in autoencoder.items()
    }
    weights |= {"first_stage_model.loss.discriminator.main.0.weight": torch.ones(3)} | dict(extra)
    return write(folder, UNET, weights, params, **options), unet_weights, autoencoder


@torch.no_grad()
@pytest.mark.parametrize("stored", [False, True])
def test_whole_model_becomes_a_pipeline(tmp_path, stored):
    params = PARAMS | ({"scale_by_std": True} if stored else {"scale_factor": 0.2})
    path, unet_weights, weights = whole_model(
        tmp_path, params, extra={"scale_factor": torch.tensor(0.2)} if stored else {}
    )
    said = []
    pipeline = load_official(path, say=said.append)
    assert isinstance(pipeline, EMLatentDiffusionPipeline)
    assert said == ["left out: 1 tensors of the loss and discriminator"]
    x, timesteps = noisy()
    expected = twins.unet(unet_weights, UNET, x, timesteps)
    assert deviation(pipeline.unet(x, timesteps).sample, expected) < 1e-5
    # latents are divided by the scale and fall on the nearest codes, and the image is the mean of
    # its colours
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    codes, _ = twins.nearest_codes(weights, FIRST_STAGE, latents / 0.2)
    images = twins.taming_decode(weights, FIRST_STAGE, codes).mean(1, keepdim=True)
    raw_latents = pipeline.denormalise_latents(latents)
    torch.testing.assert_close(raw_latents, latents / 0.2)
    torch.testing.assert_close(pipeline.normalise_latents(raw_latents), latents)
    decode = getattr(pipeline, "decode", None) or pipeline.decode_latents
    torch.testing.assert_close(decode(raw_latents), images.clamp(-1, 1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pipeline_saves_loads_and_samples(tmp_path, monkeypatch, capsys):
    path, _, _ = whole_model(tmp_path, PARAMS | {"scale_factor": 0.5})
    monkeypatch.setattr("sys.argv", ["load_official", str(path), str(tmp_path / "out")])
    main()
    assert "EMLatentDiffusionPipeline -> " in capsys.readouterr().out
    pipelines = [load_official(path), EMLatentDiffusionPipeline.from_pretrained(tmp_path / "out")]
    images = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(generator=generator, num_inference_steps=4, output_type="pt").images)
    assert type(pipelines[1].unet) is EMUNet2DModel
    assert images[0].shape == (1, 1, 16, 16)
    assert torch.equal(*images)
    assert list(pipelines[1].vqvae.config.latents_std) == [2.0] * 4


@torch.no_grad()
def test_autoencoder_of_a_whole_model(tmp_path):
    path, _, weights = whole_model(
        tmp_path, extra=buffers(torch.from_numpy(compute_betas(**SCHEDULE)).float())
    )
    autoencoder = load_autoencoder(path)
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = twins.taming_encode(weights, FIRST_STAGE, x.repeat(1, 3, 1, 1))
    assert deviation(encode(autoencoder, x), expected) < 1e-5
    assert list(autoencoder.config.latents_std) == [1.0] * 4


@torch.no_grad()
def test_gaussian_first_stage(tmp_path):
    network = FIRST_STAGE["ddconfig"] | {"double_z": True}
    first_stage = {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {"embed_dim": 4, "ddconfig": network},
    }
    path, _, weights = whole_model(
        tmp_path, PARAMS | {"first_stage_config": first_stage, "scale_factor": 0.18215}, "KL"
    )
    pipeline = load_official(path)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = twins.taming_decode(weights, first_stage["params"], latents / 0.18215).mean(
        1, keepdim=True
    )
    decoded = pipeline.vqvae.decode(pipeline.denormalise_latents(latents)).sample
    assert deviation(decoded, images) < 1e-5


def test_unet_alone_wants_an_autoencoder(tmp_path):
    path = write(tmp_path, UNET, raw(twins.random_unet(UNET)), PARAMS | {"scale_factor": 0.5})
    with pytest.raises(ValueError, match="holds a U-Net and no autoencoder; name the autoencoder"):
        load_official(path)
    whole, _, _ = whole_model(tmp_path, name="whole")
    autoencoder = load_autoencoder(whole)
    pipeline = load_official(path, autoencoder=autoencoder)
    assert list(pipeline.vqvae.config.latents_std) == [2.0] * 4


def test_autoencoder_alone_has_no_unet(tmp_path):
    weights = twins.random_taming("VQ", FIRST_STAGE)
    path = twins.write_checkpoint(tmp_path, weights, "taming.models.vqgan.VQModel", FIRST_STAGE)
    with pytest.raises(ValueError, match="is an autoencoder, and holds no U-Net"):
        load_official_unet(path)


def test_latents_of_other_width(tmp_path):
    first_stage = FIRST_STAGE | {"embed_dim": 3}
    params = PARAMS | {"first_stage_config": PARAMS["first_stage_config"] | {"params": first_stage}}
    path, _, _ = whole_model(tmp_path, params)
    with pytest.raises(ValueError, match="they do not belong together"):
        load_official(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_spatial_transformer": True, "context_dim": 64}, "has spatial transformers"),
        ({"context_dim": 64}, "has cross attention"),
        ({"num_classes": 10}, "has class conditioning"),
        ({"n_embed": 16}, "has prediction of codebook indices"),
        ({"dims": 3}, "dims: 3"),
        ({"num_heads_upsample": 2}, "other heads on the way up"),
        ({"num_heads": -1}, "neither num_heads nor num_head_channels"),
        ({"channel_mult": [2, 4]}, "channel_mult begins with 2"),
        ({"in_channels": 7}, "takes 7 channels and gives 4"),
        ({"num_res_blocks": [1, 2, 2]}, "num_res_blocks is"),
        ({"num_heads": 3}, "num_heads is 3 in the yaml, which does not divide"),
        ({"model_channels": 48}, "no multiples of 32"),
        ({"model_channels": None}, "model_channels is missing"),
        ({"conv_resample": "maybe"}, "conv_resample is 'maybe'"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path, UNET | changes, raw(twins.random_unet(UNET)))
    with pytest.raises(ValueError, match=message):
        load_official(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cond_stage_config": {"target": "ldm.modules.encoders.modules.BERTEmbedder"}},
            "is conditional .*BERTEmbedder",
        ),
        ({"cond_stage_config": "__is_first_stage__"}, "is conditional .*__is_first_stage__"),
        ({"cond_stage_config": None, "conditioning_key": "concat"}, "is conditional .*concat"),
        ({"parameterization": "score"}, "parameterization is 'score'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"linear_start": "fast"}, "linear_start is 'fast'"),
        ({"scale_factor": 0}, "scale_factor is 0"),
        (
            {"first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"}},
            "is a ldm.*IdentityFirstStage",
        ),
        ({"first_stage_config": None}, "first_stage_config is missing"),
    ],
)
def test_other_diffusion_models_are_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path, UNET, raw(twins.random_unet(UNET)), PARAMS | changes)
    with pytest.raises(ValueError, match=message):
        load_official(path)


def test_conditional_weights_are_refused(tmp_path):
    path, _, _ = whole_model(
        tmp_path, extra={"cond_stage_model.embedding.weight": torch.ones(3, 4)}
    )
    with pytest.raises(ValueError, match="is a conditional model"):
        load_official(path)


def test_numbers_as_yaml_writes_them(tmp_path):
    """`1e-4` is a word to yaml; `${...}` refers to another place of the file."""
    path = write(
        tmp_path,
        UNET,
        raw(twins.random_unet(UNET)),
        PARAMS | {"linear_start": "1e-3", "linear_end": "2e-2"},
    )
    text = path.with_suffix(".yaml").read_text()
    path.with_suffix(".yaml").write_text(
        text.replace("num_heads: 4", "num_heads: ${model.params.channels}")
    )
    unet, scheduler, _ = load_official_unet(path)
    assert unet.config.num_attention_heads == 4
    assert float(scheduler.betas[0]) == pytest.approx(1e-3)
    assert np.isclose(float(scheduler.betas[-1]), 2e-2)
