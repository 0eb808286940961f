"""What is different about each base: prompts, latents, noise, target."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import PNDMScheduler

from em_stable_diffusion import EMLoRAPipeline, base_source
from em_stable_diffusion.base_source import find_base
from em_stable_diffusion.bases import open_base
from em_stable_diffusion.reconstruction import reconstruct
from support.tiny_bases import make_stable_diffusion


def make_latents(base, count=3):
    """Latents in the denoiser's scale, noise, timesteps and embeddings."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 32, 32, generator=rng) * 2 - 1
    vae = base.load_vae()
    with torch.no_grad():
        raw = base.encode(vae, images)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in base.find_scale(vae))
    latents = (raw - mean) / std
    noise = torch.randn(latents.shape, generator=rng)
    timesteps = torch.tensor([100, 500, 900][:count])
    embeddings = base.encode_prompts(["", "dots", "lines"])
    return (
        images,
        latents,
        noise,
        timesteps.float() if base.is_continuous else timesteps,
        embeddings,
    )


def test_prompts_are_encoded_as_diffusers_encodes_them(base):
    texts = ["", "an electron micrograph", "an electron micrograph of a"]
    embeddings = base.encode_prompts(texts)
    pipeline = base.model.pipeline_class.from_pretrained(base.source.folder, safety_checker=None)
    options = dict(base.encoding)
    with torch.no_grad():
        together = pipeline.encode_prompt(texts, **options)[0]
    torch.testing.assert_close(embeddings, together, rtol=1e-4, atol=1e-4)
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.01
    assert (embeddings[1] - embeddings[2]).abs().max() > 0.01


def test_latents_have_the_scale_that_diffusers_decodes(base):
    """Drawing from latents without a step of denoising gives the autoencoder's reconstruction."""
    images, latents, *_ = make_latents(base)
    vae = base.load_vae()
    if base.source.kind == "stable-diffusion":
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    else:
        pipeline = base.model.make_pipeline(base.load_denoiser(), vae, base.load_scheduler())
        colours = images.expand(-1, 3, -1, -1)
        expected = pipeline._encode_vae_image(colours, None)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        raw = latents * std + vae.bn.running_mean.view(1, -1, 1, 1)
        decoded = vae.decode(pipeline._unpatchify_latents(raw)).sample
    grey = decoded.clamp(-1, 1).mean(dim=1, keepdim=True)
    torch.testing.assert_close(reconstruct(vae, images), grey, rtol=1e-4, atol=1e-4)
    assert 32 % base.factor == 0


def test_a_perfect_prediction_has_no_loss(base):
    """And the network is shown the noisy latents, at the level and with the prompt of each."""
    _, latents, noise, timesteps, embeddings = make_latents(base)
    if base.source.kind == "stable-diffusion":
        abar = base.noise_schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise

        def perfect(sample, seen, prompts):
            torch.testing.assert_close(sample, noisy)
            assert torch.equal(seen, timesteps)
            assert torch.equal(prompts, embeddings)
            return SimpleNamespace(sample=noise)

    else:

        def pack(tensor):
            return tensor.flatten(2).transpose(1, 2)

        s = timesteps.view(-1, 1, 1, 1) / 1000

        def perfect(hidden_states, timestep, encoder_hidden_states, img_ids, txt_ids, guidance):
            torch.testing.assert_close(hidden_states, pack((1 - s) * latents + s * noise))
            torch.testing.assert_close(timestep, s.flatten())
            assert torch.equal(encoder_hidden_states, embeddings)
            assert img_ids.shape == (3, latents[0, 0].numel(), 4)
            assert txt_ids.shape == (3, embeddings.shape[1], 4)
            return SimpleNamespace(sample=pack(noise - latents))

    perfect.dtype = torch.float32
    losses = base.compute_losses(perfect, latents, noise, timesteps, embeddings)
    assert torch.equal(losses, torch.zeros(3))


def test_losses_are_those_of_each_image_alone(base):
    _, latents, noise, timesteps, embeddings = make_latents(base)
    denoiser = base.load_denoiser()
    with torch.no_grad():
        together = base.compute_losses(denoiser, latents, noise, timesteps, embeddings)
        alone = [
            base.compute_losses(denoiser, *(each[i : i + 1] for each in row))
            for i, row in enumerate([(latents, noise, timesteps, embeddings)] * 3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert together.shape == (3,)


def test_the_noise_is_that_of_the_scheduler_of_the_base(base_folders, runs):
    """Stable Diffusion 1.5 comes with PNDM: sqrt(beta) is linear, and PNDM draws the images."""
    base = open_base(find_base(str(base_folders["stable-diffusion"])))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0).float()
    torch.testing.assert_close(base.noise_schedule.alphas_cumprod, expected)
    pipeline = EMLoRAPipeline.from_pretrained(runs["stable-diffusion"] / "pipeline")
    for scheduler in (base.load_scheduler(), pipeline.scheduler):
        assert isinstance(scheduler, PNDMScheduler)
        torch.testing.assert_close(scheduler.alphas_cumprod, expected)
        assert scheduler.config.skip_prk_steps
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [751, 501, 501, 251, 1]


def test_a_base_that_predicts_the_velocity(tmp_path):
    folder = make_stable_diffusion(tmp_path / "velocity", prediction_type="v_prediction")
    base = open_base(find_base(str(folder)))
    _, latents, noise, timesteps, embeddings = make_latents(base)
    abar = base.noise_schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)

    def perfect(*_):
        return SimpleNamespace(sample=abar.sqrt() * noise - (1 - abar).sqrt() * latents)

    perfect.dtype = torch.float32
    losses = base.compute_losses(perfect, latents, noise, timesteps, embeddings)
    torch.testing.assert_close(losses, torch.zeros(3))


def test_a_base_is_found_in_a_folder(base_folders):
    for kind, folder in base_folders.items():
        source = find_base(str(folder))
        assert (source.kind, source.repository, source.revision) == (kind, None, None)
        (facts,) = source.identify().values()
        assert len(facts) == 64


def test_other_weights_are_another_base(base_folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base_folders["stable-diffusion"], copy)
    before = find_base(str(copy)).identify()
    (copy / "text_encoder" / "model.safetensors").write_bytes(b"not read for the identity")
    assert find_base(str(copy)).identify() == before
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert find_base(str(copy)).identify() != before


def test_what_is_no_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"base is .*, which holds no model_index\.json"):
        find_base(str(tmp_path))
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a StableDiffusionXLPipeline, but must be one of Stable"):
        find_base(str(tmp_path))
    with pytest.raises(ValueError, match=r"no such folder, and it is not a Hub id"):
        find_base(str(tmp_path / "nowhere"))


def test_a_base_that_cannot_be_fetched_may_be_named_as_a_folder(monkeypatch):
    def fail(*_):
        raise ValueError("downloading some/base: no connection.")

    monkeypatch.setattr(base_source, "fetch_repository", fail)
    with pytest.raises(ValueError, match=r"no connection\. Or name a folder .* with --base"):
        base_source.find_base("some/base")
