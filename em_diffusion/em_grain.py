"""The grain of micrographs, which autoencoders remove."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from em_training.em_saved_model import OwnLayers


class EMGrain(OwnLayers, ModelMixin, ConfigMixin):
    """Adds noise to decoded images as a detector adds it to micrographs: x = y + s d(y) (h * n).

    An autoencoder has fewer numbers than pixels, and none to spare for noise: it decodes to the
    mean. Like film grain in video codecs (Norkin and Birkbeck 2018, "Film grain synthesis for AV1
    video codec"), the noise is drawn anew. n is white and Gaussian, and the filter h gives it the
    measured power spectrum and unit variance. d(y) is its deviation at the grey level y of the
    decoded image: shot noise is stronger where the image is bright, and saturation ends it. s is a
    strength for each image, drawn from those of training images, because micrographs differ in
    dose. `em_diffusion.grain.fit_grain` measures all of it.

    Args:
        sample_size: Height and width of the images in pixels.

    Attributes:
        amplitude: |h| at each frequency, [H, W // 2 + 1] in the order of `torch.fft.rfft2`, with a
            mean square of 1 over the whole plane.
        grey_levels, deviations: [num_grey_levels], in [-1, 1] and in its units; linear in between,
            constant beyond.
        strengths: [num_strengths], evenly spaced quantiles of s from 0 to 1.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: tuple[int, int] = (64, 64),
        num_grey_levels: int = 16,
        num_strengths: int = 64,
    ):
        super().__init__()
        height, width = sample_size
        self.amplitude = nn.Parameter(torch.ones(height, width // 2 + 1), requires_grad=False)
        self.grey_levels = nn.Parameter(torch.linspace(-1, 1, num_grey_levels), requires_grad=False)
        self.deviations = nn.Parameter(torch.zeros(num_grey_levels), requires_grad=False)
        self.strengths = nn.Parameter(torch.ones(num_strengths), requires_grad=False)

    @torch.no_grad()
    def forward(
        self, images, generator: torch.Generator | list[torch.Generator] | None = None, drawn=None
    ):
        """Add grain to images [B, 1, H, W] in [-1, 1]; the caller clamps what leaves [-1, 1].

        Images may be larger than `sample_size`: the grain is then drawn for the whole image.

        Args:
            generator: One for the batch, or a list of B. With a list, image i depends on generator
                i alone.
            drawn: What `draw` returned, instead of `generator`.

        Raises:
            ValueError: For images smaller than `sample_size`.
        """
        size = tuple(images.shape[-2:])
        if any(n < least for n, least in zip(size, self.config.sample_size)):
            raise ValueError(
                f"the grain was measured on images of {tuple(self.config.sample_size)} pixels, "
                f"these have {size}; decode with add_grain=False, or measure the grain at their "
                "size (em_diffusion.grain.fit_grain)."
            )
        images = images.float()
        drawn = self.draw(len(images), generator, images.device, size) if drawn is None else drawn
        noise, normal = (each.to(images.device) for each in drawn)
        deviation = noise_deviation(images, self.grey_levels, self.deviations)
        return images + deviation * self.filter(noise) * self.find_strengths(normal)

    def draw(self, num_images, generator, device, size=None):
        """Draw white noise [B, 1, H, W] and a normal number for each image [B, 1], float32.

        size: (H, W), by default `sample_size`. A CPU generator makes a GPU wait for its earlier
        work: draw before the images are decoded.
        """
        shapes = ((num_images, 1, *(size or self.config.sample_size)), (num_images, 1))
        return tuple(
            randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            for shape in shapes
        )

    def filter(self, noise):
        """Give white noise [B, 1, H, W] the grain's power spectrum, at unit variance."""
        size = tuple(noise.shape[-2:])
        spectrum = torch.fft.rfft2(noise) * self._find_amplitude(size)  # [B, 1, H, W // 2 + 1]
        return torch.fft.irfft2(spectrum, s=size)

    def _find_amplitude(self, size):
        """Return |h| for images of `size` (H, W): the same filter, with zeros around its taps."""
        measured, amplitude = tuple(self.config.sample_size), self.amplitude.float()
        if size == measured:
            return amplitude
        taps = torch.fft.fftshift(torch.fft.irfft2(amplitude, s=measured))
        padded = taps.new_zeros(size)
        padded[: measured[0], : measured[1]] = taps
        return torch.fft.rfft2(padded).abs()

    def find_strengths(self, normal):
        """Return a strength for each image [B, 1, 1, 1] from normal numbers [B, 1]."""
        uniform = torch.special.ndtr(normal)
        positions = torch.linspace(0, 1, len(self.strengths), device=normal.device)
        return interpolate(uniform, positions, self.strengths.float()).view(-1, 1, 1, 1)


def noise_deviation(images, grey_levels, deviations):
    """Return d(y), the deviation of the grain at each pixel of decoded images."""
    return interpolate(images, grey_levels.float(), deviations.float())


def interpolate(x, knots, values):
    """Interpolate linearly between ascending knots [K] with values [K]; constant beyond them."""
    if len(knots) == 1:
        return values[0].expand(x.shape)
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    share = (x - knots[left]) / (knots[right] - knots[left]).clamp(min=1e-12)
    return torch.lerp(values[left], values[right], share.clamp(0, 1))
