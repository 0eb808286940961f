"""Held-out views, and how well an autoencoder reconstructs images."""

import numpy as np
import torch

from em_diffusion.autoencoder import decode, encode
from em_diffusion.reconstruction import SSIM_WINDOW_PX, psnr, spectrum_error_db, ssim
from em_training import run_in_parts


def choose_spaced_views(tiles, count: int):
    """Return the ids of up to `count` views, evenly spaced over all: int64 [N]."""
    return space_evenly(tiles.num_views, count)


def space_evenly(num: int, count: int):
    """Return up to `count` of the numbers 0 to num - 1, evenly spaced: int64 [N]."""
    return np.unique(np.linspace(0, num - 1, min(count, num)).astype(np.int64))


def read_spaced_images(tiles, count: int):
    """Return up to `count` views, evenly spaced over all: float32 [N, 1, R, R]."""
    return tiles.batch(choose_spaced_views(tiles, count))


def reconstruct(model, images, accelerator, batch_size: int = 32):
    """Encode and decode images [N, 1, R, R] in [-1, 1]; float32 on the CPU, clamped to [-1, 1]."""
    model.eval()

    def reconstruct_part(images):
        images = images.to(accelerator.device, memory_format=torch.channels_last)
        with accelerator.autocast():
            decoded = decode(model, encode(model, images))
        return decoded.float().clamp(-1, 1).cpu()

    return run_in_parts(reconstruct_part, images, size=batch_size)


def evaluate_reconstruction(model, images, accelerator, batch_size: int = 32) -> dict[str, float]:
    """Measure the reconstructions of images [N, 1, R, R] in [-1, 1].

    Returns:
        Mean absolute error, PSNR in dB, error of the power spectrum in dB, and SSIM unless the
        images are smaller than its window of 11 pixels.
    """
    images = images.float()
    reconstructions = reconstruct(model, images, accelerator, batch_size)
    metrics = {
        "held_out_l1": float((reconstructions - images).abs().mean()),
        "held_out_psnr": float(psnr(images, reconstructions).mean()),
        "held_out_spectrum_error_db": spectrum_error_db(images, reconstructions),
    }
    if images.shape[-1] >= SSIM_WINDOW_PX:
        metrics["held_out_ssim"] = float(ssim(images, reconstructions).mean())
    return metrics
