"""Surrogate images that keep an image's power spectrum and have no other structure."""

import numpy as np
import torch
from numpy.typing import ArrayLike


def phase_randomised_surrogates(images: ArrayLike, seed: int = 0) -> torch.Tensor:
    """Return images with the spectrum of `images` and random phases (Theiler et al. 1992).

    The phases are those of white Gaussian noise; the mean is kept. The spectrum is exact to
    rounding, and values may lie outside [-1, 1]: see `fraction_outside`. Image i of a seed is the
    same in every batch. The jump between opposite edges of a tile is spread over its surrogate.

    Args:
        images: [N, 1, H, W].
        seed: Seed of the phases.
    """
    images = torch.as_tensor(images)
    surrogates = torch.empty_like(images, dtype=torch.float32)
    for i, image in enumerate(images.numpy()):
        noise = np.random.default_rng([seed, i]).standard_normal(image.shape)
        spectrum = np.fft.rfft2(noise)
        spectrum /= np.abs(spectrum)
        spectrum[..., 0, 0] = 1
        original = np.fft.rfft2(image.astype(np.float64))
        amplitude = np.abs(original)
        amplitude[..., 0, 0] = original[..., 0, 0].real
        surrogates[i] = torch.from_numpy(
            np.fft.irfft2(amplitude * spectrum, s=image.shape[-2:]).astype(np.float32)
        )
    return surrogates


def fraction_outside(images) -> float:
    """Return the fraction of pixels outside [-1, 1], which quantisation clips."""
    return float((torch.as_tensor(images).abs() > 1).double().mean())
