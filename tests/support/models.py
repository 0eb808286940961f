"""Tiny models of both families, and what tests ask of any of them."""

import torch
from diffusers import DDIMScheduler, VQModel

from em_diffusion.em_grain import EMGrain
from em_diffusion.em_layout_sampler import EMLayoutSampler
from em_diffusion.em_unet2d_model import EMUNet2DModel
from em_diffusion.masks import widen_input
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_diffusion.pipeline_em_mask_ldm import EMMaskLatentDiffusionPipeline
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline


def make_conditional_ldm(names=("copper", "steel", "tin")):
    """A latent diffusion model of 16 x 16 pixels whose U-Net and guide have classes."""
    return make_ldm(names=names)


def make_ldm(seed=0, names=()):
    """A latent diffusion model of 16 x 16 pixels: codebook, U-Net and guide of our own, grain."""
    torch.manual_seed(seed)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vqvae = VQModel(1, 1, latent_channels=2, num_vq_embeddings=16, **kinds, **blocks)
    vqvae.register_to_config(latents_mean=[0.1, -0.1], latents_std=[1.0, 0.5])
    kinds = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    kinds |= {"num_class_embeds": len(names) + 1} if names else {}
    unet, guide = (
        EMUNet2DModel(8, 2, 2, num_attention_heads=2, **kinds, **blocks).eval() for _ in range(2)
    )
    grain = EMGrain(sample_size=(16, 16), num_grey_levels=2, num_strengths=2)
    grain.load_state_dict(grain.state_dict() | {"deviations": torch.tensor([0.05, 0.1])})
    pipeline = EMLatentDiffusionPipeline(
        vqvae.eval(),
        unet,
        DDIMScheduler(clip_sample=False),
        pixel_size_nm=0.5,
        default_num_inference_steps=3,
        grain=grain,
        guide=guide,
        guidance_scale=1.25,
        id2label=dict(enumerate(names)) if names else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_layout_sampler():
    """Squares as dots and loops, about three to a tile of 16 pixels."""
    sampler = EMLayoutSampler(("dot", "loop"), num_layouts=2, num_shapes=2, num_bytes=6)
    values = {
        "densities": torch.tensor([[2.0, 1.0], [1.0, 0.0]]) / 256,
        "shape_kinds": torch.tensor([0, 1]),
        "shape_sizes": torch.tensor([[3, 3], [5, 6]]),
        "shape_bits": torch.full((6,), 255, dtype=torch.uint8),
    }
    sampler.load_state_dict(sampler.state_dict() | values)
    return sampler


def make_mask_ldm(seed=0, trained=True, **options):
    """The latent diffusion model of `make_ldm` with masks of two kinds; its guide takes them."""
    plain = make_ldm(seed)
    unet, guide = (widen_input(each, 13) for each in (plain.unet, plain.guide))
    if trained:
        for each in (unet, guide):
            torch.nn.init.normal_(each.conv_in.weight[:, 2:], std=0.2)
    pipeline = EMMaskLatentDiffusionPipeline(
        plain.vqvae,
        unet,
        plain.scheduler,
        make_layout_sampler(),
        pixel_size_nm=0.5,
        default_num_inference_steps=3,
        grain=plain.grain,
        guide=guide,
        guidance_scale=1.0,
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_stylegan(seed=0):
    """A StyleGAN2 of 16 x 16 pixels."""
    torch.manual_seed(seed)
    generator = StyleGAN2Generator(
        16, z_dim=8, w_dim=8, mapping_depth=2, channel_base=64, max_channels=8
    ).eval()
    for block in generator.synthesis_network.blocks:
        torch.nn.init.constant_(block.conv1.noise_strength, 0.2)
    return EMStyleGANPipeline(generator, pixel_size_nm=0.5)


def make_stylegan3(seed=0):
    """A StyleGAN3-T of 16 x 16 pixels."""
    torch.manual_seed(seed)
    generator = StyleGAN3Generator(
        16, z_dim=8, w_dim=8, mapping_depth=2, channel_base=64, max_channels=8, num_layers=4
    ).eval()
    return EMStyleGANPipeline(generator, pixel_size_nm=0.5)


MAKERS = {"ldm": make_ldm, "stylegan": make_stylegan, "mask-ldm": make_mask_ldm}


def draw(pipeline, *seeds, **options):
    """Images [B, H, W, 1] in [0, 1], each of a generator of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(len(seeds), generator=generators, output_type="np", **options).images
