"""The grain of micrographs, which autoencoders leave out: one self-contained file, which travels with its numbers."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import nn


class EMGrain(ModelMixin, ConfigMixin):
    """Adds noise to decoded images as the detector adds it to micrographs: x = y + s d(y) (h * n).

    An autoencoder has fewer numbers than pixels, and none to spare for noise: it decodes to the mean of what could have been there.
    As video codecs do with film (Norkin and Birkbeck 2018, "Film grain synthesis for AV1 video codec"), the noise is drawn anew:
    n is white and Gaussian, the filter h gives it the measured power spectrum and unit variance, d(y) is its deviation where the
    decoded image has the grey level y (shot noise is stronger in the bright, saturation ends it), and s, one number per image, is
    drawn from those of training images, since micrographs differ in dose. `em_diffusion.grain.fit_grain` measures all of it.

    amplitude: |h| at each frequency, [H, W // 2 + 1] as `torch.fft.rfft2` orders them, mean square 1 over the whole plane.
    grey_levels, deviations: [num_grey_levels], in [-1, 1] and in units of those; linear between, constant beyond.
    strengths: [num_strengths], quantiles of s from 0 to 1, evenly spaced.

    sample_size: height and width of the images in pixels.
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
        """Images [B, 1, H, W] in [-1, 1] with their grain, in float32; what leaves [-1, 1] is for the caller to clamp.

        generator: one for the batch, or a list of B; with a list, image i depends on generator i alone.
        drawn: what `draw` has returned, instead of `generator`.
        Raises `ValueError` for images of another size than `sample_size`.
        """
        if tuple(images.shape[-2:]) != tuple(self.config.sample_size):
            raise ValueError(
                f"the grain was measured on images of {tuple(self.config.sample_size)} pixels, these have {tuple(images.shape[-2:])}; "
                "decode with add_grain=False, or measure it at their size (em_diffusion.grain.fit_grain)."
            )
        images = images.float()
        drawn = self.draw(len(images), generator, images.device) if drawn is None else drawn
        noise, normal = (each.to(images.device) for each in drawn)
        deviation = noise_deviation(images, self.grey_levels, self.deviations)
        return images + deviation * self.filter(noise) * self.find_strengths(normal)

    def draw(self, num_images, generator, device):
        """All that is random in the grain of a batch: white noise [B, 1, H, W] and a normal number per image [B, 1], float32; both normal,
        since `randn_tensor` knows lists of generators and their devices.

        Generators of the CPU make a GPU wait for what it was given before: draw ahead of the work that the grain goes on top of.
        """
        shapes = ((num_images, 1, *self.config.sample_size), (num_images, 1))
        return tuple(
            randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            for shape in shapes
        )

    def filter(self, noise):
        """White noise [B, 1, H, W] -> noise of unit variance with the power spectrum of the grain, periodic at the edges."""
        spectrum = torch.fft.rfft2(noise) * self.amplitude.float()  # [B, 1, H, W // 2 + 1]
        return torch.fft.irfft2(spectrum, s=noise.shape[-2:])

    def find_strengths(self, normal):
        """How strong each image's grain is, from a normal number [B, 1]: [B, 1, 1, 1], by the inverse of their cumulative distribution."""
        uniform = torch.special.ndtr(normal)
        positions = torch.linspace(0, 1, len(self.strengths), device=normal.device)
        return interpolate(uniform, positions, self.strengths.float()).view(-1, 1, 1, 1)


def noise_deviation(images, grey_levels, deviations):
    """d(y): the deviation of the grain at each pixel of decoded images, of their shape."""
    return interpolate(images, grey_levels.float(), deviations.float())


def interpolate(x, knots, values):
    """Piecewise linear function through (knots, values), both [K] with ascending knots, constant beyond them; of any shape."""
    if len(knots) == 1:
        return values[0].expand(x.shape)
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    share = (x - knots[left]) / (knots[right] - knots[left]).clamp(min=1e-12)
    return torch.lerp(values[left], values[right], share.clamp(0, 1))
