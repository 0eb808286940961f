"""How well images are reconstructed: PSNR, SSIM and the radial power spectrum."""

import torch
import torch.nn.functional as F

from em_evaluation.micrograph_statistics import ring_powers

DATA_RANGE = 2.0  # of images in [-1, 1]
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
CHUNK = 64  # images at a time, which bounds the memory


def psnr(images, reconstructions):
    """Return the peak signal-to-noise ratio of each reconstruction, float32 [N] in dB.

    It is 10 log10(range^2 / mean squared error) with a range of 2, and at most 106 dB, where the
    error is that of rounding. Both images are [N, 1, H, W] in [-1, 1].
    """
    check_shapes(images, reconstructions)
    squared_error = (reconstructions.float() - images.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(DATA_RANGE**2 / squared_error.clamp(min=1e-10))


def ssim(images, reconstructions):
    """Return the structural similarity of each reconstruction, float32 [N], 1 for equal images.

    It is the mean of the SSIM index over all positions of a Gaussian window of 11 x 11 pixels and
    deviation 1.5 that lie inside the image, with K1 = 0.01, K2 = 0.03 and a range of 2 (Wang et al.
    2004, IEEE Trans. Image Process. 13, 600, equation 13). Both images are [N, 1, H, W] in [-1, 1].

    Raises:
        ValueError: For images smaller than the window.
    """
    check_shapes(images, reconstructions)
    if min(images.shape[-2:]) < SSIM_WINDOW_PX:
        raise ValueError(
            f"SSIM needs images of {SSIM_WINDOW_PX} x {SSIM_WINDOW_PX} pixels or more, not "
            f"{list(images.shape)}"
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


def spectrum_difference_db(images, reconstructions):
    """Return the reconstructions' power over the images' by spatial frequency, in dB.

    0 is right, negative is a loss: an autoencoder that removes the grain of micrographs is low at
    high frequencies.

    Args:
        images, reconstructions: [N, 1, H, W] in [-1, 1].

    Returns:
        Float64 [min(H, W) // 2]; the frequencies are `em_evaluation.micrograph_statistics.
        frequency_bins`.
    """
    check_shapes(images, reconstructions)
    original, decoded = (
        torch.from_numpy(ring_powers(each[:, 0].cpu().numpy()).mean(0)).clamp(min=1e-12)
        for each in (images, reconstructions)
    )
    return 10 * torch.log10(decoded / original)


def spectrum_error_db(images, reconstructions) -> float:
    """Return the mean absolute `spectrum_difference_db` over frequencies, 0 for equal spectra."""
    return float(spectrum_difference_db(images, reconstructions).abs().mean())


def check_shapes(images, reconstructions):
    """Refuse two batches that are not [N, 1, H, W] both."""
    if images.shape != reconstructions.shape or images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(
            f"images and reconstructions must both be [N, 1, H, W], not {list(images.shape)} and "
            f"{list(reconstructions.shape)}"
        )
