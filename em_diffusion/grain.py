"""Measuring the grain that an autoencoder leaves out."""

import math

import torch

from em_diffusion.em_grain import EMGrain, noise_deviation
from em_diffusion.reconstruction import frequency_rings

CHUNK = 64  # images at a time
MAX_PIXELS = 2**26  # to measure on, 1,000 images of 256 x 256: about 1.5 GB of memory
DRAWN_PIXELS = 1_000_000  # for the edges of the bins of grey levels
SMALLEST = 1e-6  # deviation: a thirtieth of a grey level of 16 bits is no grain


def fit_grain(
    images, reconstructions, num_grey_levels: int = 16, num_strengths: int = 64
) -> EMGrain:
    """Measure what `reconstructions` lack of the grain of `images`; both [N, 1, H, W] in [-1, 1], float32 on the CPU.

    Of the residual, images less reconstructions: its deviation in bins of the reconstruction's grey level (equally many pixels each),
    its power spectrum over that, and how strong each image's is. The spectrum is the median over images and the strength the median
    over frequencies, so that structure which the autoencoder lost, in some images and at some frequencies, is not taken for noise.
    At each radius of frequency only as much is taken as the reconstructions lack of the images' power, so that an autoencoder which
    draws grain of its own (a patch discriminator's work) is given the rest, or nothing; and no more than the residual has.
    Raises `ValueError` for arrays of two shapes.
    """
    if images.shape != reconstructions.shape or images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(
            f"images and reconstructions are both [N, 1, H, W], not {list(images.shape)} and {list(reconstructions.shape)}"
        )
    residuals = images - reconstructions
    grey_levels, deviations = measure_deviations(reconstructions, residuals, num_grey_levels)
    relative = torch.cat(
        [
            r / noise_deviation(y, grey_levels, deviations).clamp(min=SMALLEST)
            for r, y in zip(residuals.split(CHUNK), reconstructions.split(CHUNK))
        ]
    )
    power = measure_power(relative)  # [H, W // 2 + 1]
    typical, strengths = measure_noise(relative, power)
    kept = typical * missing_share(images, reconstructions, residuals)
    height, width = images.shape[-2:]
    _, counts = frequency_rings(height, width)
    grain = EMGrain((height, width), len(grey_levels), num_strengths)
    mean_kept, mean_power = (float((each * counts).sum() / counts.sum()) for each in (kept, power))
    values = {
        "amplitude": (kept / mean_kept).sqrt() if mean_kept > 0 else torch.zeros_like(kept),
        "grey_levels": grey_levels,
        "deviations": deviations * (mean_kept / mean_power) ** 0.5
        if mean_power > 0
        else deviations,
        "strengths": torch.quantile(strengths, torch.linspace(0, 1, num_strengths)),
    }
    grain.load_state_dict(values)
    return grain.eval()


def measure_deviations(reconstructions, residuals, num_bins):
    """Mean grey level and root mean square residual in up to `num_bins` bins of about as many pixels each: two [K]."""
    levels = reconstructions.flatten()
    drawn = levels[:: max(1, len(levels) // DRAWN_PIXELS)]
    edges = torch.quantile(drawn, torch.linspace(0, 1, num_bins + 1))[1:-1].unique()
    sums = torch.zeros(3, len(edges) + 1, dtype=torch.float64)
    for y, r in zip(reconstructions.split(CHUNK), residuals.split(CHUNK)):
        y, r = y.flatten(), r.flatten()
        bins = torch.bucketize(y, edges)
        for total, weights in zip(sums, (torch.ones_like(y), y, r.square())):
            total += torch.bincount(bins, weights=weights.double(), minlength=len(total))
    counts, level_sums, squares = sums[:, sums[0] > 0]  # a bin between two equal edges is empty
    return (level_sums / counts).float(), (squares / counts).sqrt().float()


def measure_noise(relative, power):
    """(power of noise at each frequency [H, W // 2 + 1], each image's strength over that [N]), for residuals [N, 1, H, W] of mean `power`.

    The power of Gaussian noise at a frequency is exponentially distributed, and the median of that is ln 2 of its mean. Frequencies
    without noise tell nothing of its strength.
    """
    powers = torch.cat(
        [torch.fft.rfft2(part[:, 0]).abs().square() for part in relative.split(CHUNK)]
    )
    powers /= relative.shape[-2] * relative.shape[-1]  # [N, H, W // 2 + 1]
    typical = torch.minimum(powers.median(dim=0).values / math.log(2), power)
    noisy = typical > 0.01 * typical.mean()
    if not noisy.any():
        return typical, torch.ones(len(relative))
    return typical, ((powers[:, noisy] / typical[noisy]).median(dim=1).values / math.log(2)).sqrt()


def missing_share(images, reconstructions, residuals):
    """The share of the residuals' power that the reconstructions lack, 0 to 1, at each frequency: [H, W // 2 + 1]; equal on rings."""
    radius, counts = (each.flatten() for each in frequency_rings(*images.shape[-2:]))

    def average(power):
        """Means over rings."""
        return torch.bincount(radius, weights=power.flatten() * counts) / torch.bincount(
            radius, weights=counts
        )

    original, decoded, left = (
        average(measure_power(each)) for each in (images, reconstructions, residuals)
    )
    share = torch.where(left > 0, (original - decoded) / left.clamp(min=1e-30), 0.0).clamp(0, 1)
    return share[radius].float().view(images.shape[-2], -1)


def measure_power(images):
    """Mean squared Fourier amplitude of images [N, 1, H, W] per pixel: float32 [H, W // 2 + 1]."""
    total = sum(
        torch.fft.rfft2(part[:, 0].double()).abs().square().sum(dim=0)
        for part in images.split(CHUNK)
    )
    return (total / (len(images) * images.shape[-1] * images.shape[-2])).float()
