"""How well images are reconstructed, pixel by pixel and frequency by frequency: PSNR, SSIM, radial power spectrum."""

import torch
import torch.nn.functional as F

DATA_RANGE = 2.0  # of images in [-1, 1]
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
CHUNK = 64  # images at a time, which bounds the memory


def psnr(images, reconstructions):
    """Peak signal-to-noise ratio of each reconstruction, float32 [N] in dB; both [N, 1, H, W] in [-1, 1].

    10 log10(range^2 / mean squared error) with a range of 2; at most 106 dB, where the error is that of rounding.
    """
    _check_shapes(images, reconstructions)
    squared_error = (reconstructions.float() - images.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(DATA_RANGE**2 / squared_error.clamp(min=1e-10))


def ssim(images, reconstructions):
    """Structural similarity of each reconstruction, float32 [N], 1 for equal images; both [N, 1, H, W] in [-1, 1].

    The mean of the SSIM index over all positions of a Gaussian window of 11 x 11 pixels and deviation 1.5 that lie in the
    image whole, with K1 = 0.01, K2 = 0.03 and a range of 2 (Wang et al. 2004, IEEE Trans. Image Process. 13, 600,
    equation 13). Raises `ValueError` for images smaller than the window.
    """
    _check_shapes(images, reconstructions)
    if min(images.shape[-2:]) < SSIM_WINDOW_PX:
        raise ValueError(
            f"SSIM needs images of {SSIM_WINDOW_PX} x {SSIM_WINDOW_PX} pixels or more, not {list(images.shape)}"
        )
    pairs = zip(images.split(CHUNK), reconstructions.split(CHUNK))
    return torch.cat([_ssim_map(x.float(), y.float()).mean(dim=(1, 2, 3)) for x, y in pairs])


def _ssim_map(x, y):
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    offsets = torch.arange(SSIM_WINDOW_PX, device=x.device) - SSIM_WINDOW_PX // 2
    weights = torch.exp(-offsets.float().square() / (2 * SSIM_SIGMA_PX**2))
    weights = weights / weights.sum()
    moments = torch.cat([x, y, x * x, y * y, x * y], dim=1)  # [B, 5, H, W]
    window = weights.expand(5, 1, -1)
    moments = F.conv2d(moments, window[:, :, :, None], groups=5)
    moments = F.conv2d(moments, window[:, :, None, :], groups=5)  # [B, 5, H - 10, W - 10]
    mean_x, mean_y, square_x, square_y, product = moments.split(1, dim=1)
    variances = square_x - mean_x**2 + square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)  # [B, 1, H - 10, W - 10]


def radial_power_spectrum(images):
    """Power of images [N, 1, H, W] by spatial frequency, averaged over directions and images: float64 [min(H, W) // 2].

    Entry k - 1 is the mean squared Fourier amplitude at the frequencies that round to k cycles over the shorter side, k
    from 1 to the Nyquist frequency. Each image loses its mean and is weighted by a Hann window, so that the jump between
    opposite edges does not pass for fine structure.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    window = torch.outer(
        *(torch.hann_window(n, periodic=False, dtype=torch.float64) for n in (height, width))
    )
    radius, weights = (each.flatten() for each in frequency_rings(height, width))
    power = torch.zeros(height * (width // 2 + 1), dtype=torch.float64)
    for part in images.split(CHUNK):
        part = part[:, 0].double().cpu()
        part = (part - part.mean(dim=(1, 2), keepdim=True)) * window
        power += torch.fft.rfft2(part).abs().square().sum(dim=0).flatten()
    totals = torch.bincount(radius, weights=power * weights) / torch.bincount(
        radius, weights=weights
    )
    return totals[1 : side // 2 + 1] / len(images)


def frequency_rings(height, width):
    """Of each entry of an `rfft2`: its radius, rounded, in cycles over the shorter side, int64 [H, W // 2 + 1], and how many frequencies
    of the whole plane it stands for, 1 or 2, float64 [H, W // 2 + 1]."""
    rows, columns = (
        torch.fft.fftfreq(height, dtype=torch.float64),
        torch.fft.rfftfreq(width, dtype=torch.float64),
    )
    radius = (torch.hypot(rows[:, None], columns[None]) * min(height, width)).round().long()
    # all but the first and, for an even width, the last column stand for their mirror image too
    counts = torch.full((height, width // 2 + 1), 2.0, dtype=torch.float64)
    counts[:, 0] = 1
    if width % 2 == 0:
        counts[:, -1] = 1
    return radius, counts


def spectrum_difference_db(images, reconstructions):
    """Power of the reconstructions over that of the images at each frequency, in dB: float64 [min(H, W) // 2].

    0 is right, negative a loss: an autoencoder that leaves out the grain of micrographs falls off at the high end. Both
    [N, 1, H, W] in [-1, 1]; see `radial_power_spectrum`.
    """
    _check_shapes(images, reconstructions)
    original, reconstructed = (
        radial_power_spectrum(each).clamp(min=1e-12) for each in (images, reconstructions)
    )
    return 10 * torch.log10(reconstructed / original)


def spectrum_error_db(images, reconstructions) -> float:
    """Mean over all frequencies of the absolute `spectrum_difference_db`: one number, 0 for a spectrum kept."""
    return float(spectrum_difference_db(images, reconstructions).abs().mean())


def _check_shapes(images, reconstructions):
    if images.shape != reconstructions.shape or images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(
            f"images and reconstructions are both [N, 1, H, W], not {list(images.shape)} and {list(reconstructions.shape)}"
        )
