"""Tiny random text-to-image models of the classes that are tuned, made on the spot."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_vocabulary(folder, special, end=""):
    """Write a byte-level vocabulary without merges."""
    folder.mkdir(parents=True)
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + end for letter in letters if end), *special]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return vocabulary


def make_stable_diffusion(folder, seed=0, license="creativeml-openrail-m", **scheduler):
    """A pipeline of Stable Diffusion's class in `folder`: images of 8 times the latents' side.

    Its scheduler has the file of Stable Diffusion 1.5, where PNDM does not know `clip_sample`.
    """
    torch.manual_seed(seed)
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = write_vocabulary(folder.with_name(f"{folder.name}-vocabulary"), special, "</w>")
    tokenizer = CLIPTokenizer.from_pretrained(folder.with_name(f"{folder.name}-vocabulary"))
    tokenizer.model_max_length = 24
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=vocabulary[special[0]],
        eos_token_id=vocabulary[special[1]],
        pad_token_id=vocabulary[special[1]],
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    options = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    pipeline = StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        PNDMScheduler(**options | scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(pipeline, folder, license)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}))
    return folder


def make_flux2_klein(folder, seed=0, license="apache-2.0"):
    """A pipeline of FLUX.2 [klein]'s class in `folder`: images of 4 times the latents' side."""
    torch.manual_seed(seed)
    special = ["<|endoftext|>"]
    vocabulary = write_vocabulary(folder.with_name(f"{folder.name}-vocabulary"), special)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder.with_name(f"{folder.name}-vocabulary"))
    tokenizer.chat_template = TEMPLATE
    text = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=28,  # embeddings are taken after the 27th
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=512,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    pipeline = Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae,
        Qwen3ForCausalLM(text),
        tokenizer,
        transformer,
    )
    return save(pipeline, folder, license)


def save(pipeline, folder, license):
    pipeline.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n\n# A tiny base\n")
    return folder


MAKERS = {"stable-diffusion": make_stable_diffusion, "flux2-klein": make_flux2_klein}
