"""Measuring the grain that an autoencoder removes from micrographs."""

import torch

from em_diffusion.em_grain import EMGrain, noise_deviation
from em_diffusion.reconstruction import check_shapes
from em_training.noise import measure_noise, measure_power

CHUNK = 64  # images at a time
DRAWN_PIXELS = 1_000_000  # for the edges of the bins of grey levels
SMALLEST = 1e-6  # deviation: a thirtieth of a 16-bit grey level is no grain


def fit_grain(
    images, reconstructions, num_grey_levels: int = 16, num_strengths: int = 64
) -> EMGrain:
    """Measure the grain of `images` that `reconstructions` lack.

    Three things are measured on the residual, images less reconstructions: its deviation in bins of
    the reconstruction's grey level (with equally many pixels), its power spectrum relative to that,
    and the strength in each image. The spectrum is the median over images, the strength the
    median over frequencies: structure that the autoencoder lost in some images and at some
    frequencies is not taken for noise. At each radius of frequency, the power is at most what the
    reconstructions lack of the images' power, and at most the residual's. An autoencoder that
    draws grain of its own (because of a patch discriminator) gets only the rest, or nothing.

    Args:
        images, reconstructions: Float32 [N, 1, H, W] in [-1, 1] on the CPU.

    Raises:
        ValueError: If the shapes differ.
    """
    check_shapes(images, reconstructions)
    residuals = images - reconstructions
    grey_levels, deviations = measure_deviations(reconstructions, residuals, num_grey_levels)
    parts = zip(residuals.split(CHUNK), reconstructions.split(CHUNK))
    relative = torch.cat(
        [r / noise_deviation(y, grey_levels, deviations).clamp(min=SMALLEST) for r, y in parts]
    )
    power = measure_power(relative)  # [H, W // 2 + 1]
    typical, strengths = measure_noise(relative, power)
    kept = typical * missing_share(images, reconstructions, residuals)
    height, width = images.shape[-2:]
    _, counts = frequency_rings(height, width)
    grain = EMGrain((height, width), len(grey_levels), num_strengths)
    mean_kept, mean_power = (float((each * counts).sum() / counts.sum()) for each in (kept, power))
    if mean_power > 0:
        deviations = deviations * (mean_kept / mean_power) ** 0.5
    values = {
        "amplitude": (kept / mean_kept).sqrt() if mean_kept > 0 else torch.zeros_like(kept),
        "grey_levels": grey_levels,
        "deviations": deviations,
        "strengths": torch.quantile(strengths, torch.linspace(0, 1, num_strengths)),
    }
    grain.load_state_dict(values)
    return grain.eval()


def measure_deviations(reconstructions, residuals, num_bins):
    """Return mean grey level and root mean square residual of up to `num_bins` bins: two [K].

    The bins have about equally many pixels.
    """
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


def missing_share(images, reconstructions, residuals):
    """Return the share of the residuals' power that the reconstructions lack, 0 to 1.

    It is [H, W // 2 + 1], a number for each frequency, equal on rings.
    """
    radius, counts = (each.flatten() for each in frequency_rings(*images.shape[-2:]))

    def average(images):
        power = torch.bincount(radius, weights=measure_power(images).flatten() * counts)
        return power / torch.bincount(radius, weights=counts)

    original, decoded, left = map(average, (images, reconstructions, residuals))
    share = torch.where(left > 0, (original - decoded) / left.clamp(min=1e-30), 0.0).clamp(0, 1)
    return share[radius].float().view(images.shape[-2], -1)


def frequency_rings(height, width):
    """Return the rings of the entries of an `rfft2`.

    Returns:
        The radius of each entry in cycles over the shorter side, rounded, int64
        [H, W // 2 + 1]; and how many frequencies of the whole plane it stands for, 1 or 2, float64
        [H, W // 2 + 1].
    """
    rows = torch.fft.fftfreq(height, dtype=torch.float64)
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)
    radius = (torch.hypot(rows[:, None], columns[None]) * min(height, width)).round().long()
    # all but the first and, for an even width, the last column also stand for their mirror image
    counts = torch.full((height, width // 2 + 1), 2.0, dtype=torch.float64)
    counts[:, 0] = 1
    if width % 2 == 0:
        counts[:, -1] = 1
    return radius, counts
