"""Adaptive augmentation of what the discriminator sees (ADA, Karras et al. 2020), for grey images.

Real and generated images pass the same kinds of random transformations (pixel blitting, geometry,
intensity), each applied with probability p, so that a discriminator with few images cannot learn
them by heart. Below p = 1 enough images stay unchanged for the generator to learn the distribution
without augmentation: the augmentations do not leak (section 2 and appendix C).
"""

import math

import torch
import torch.nn.functional as F

from em_stylegan.em_stylegan3_generator import design_filter, downsample, upsample

# of the image's side: largest shift by whole pixels, and deviation of the fractional shift
TRANSLATION = 0.125
SCALE_DEVIATION = 0.2  # of log2
BRIGHTNESS_DEVIATION = 0.2  # of a range of 2
CONTRAST_DEVIATION = 0.5  # of log2
NUM_TAPS = 12


class _Sample(torch.autograd.Function):
    """Bilinear samples of x [B, C, H, W] at grid [B, H', W', 2], reflected at the borders.

    Sampling is linear in x: its derivatives of any order are this and its adjoint. PyTorch's own
    has first derivatives only.
    """

    @staticmethod
    def forward(ctx, x, grid):
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return F.grid_sample(
            x, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )

    @staticmethod
    def backward(ctx, y):
        (grid,) = ctx.saved_tensors
        return _SampleAdjoint.apply(y, grid, ctx.shape), None


class _SampleAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, grid, shape):
        ctx.save_for_backward(grid)
        empty = y.new_empty(()).expand(shape)  # only its shape is read
        return torch.ops.aten.grid_sampler_2d_backward(
            y.contiguous(), empty, grid, 0, 2, False, (True, False)
        )[0]

    @staticmethod
    def backward(ctx, x):
        (grid,) = ctx.saved_tensors
        return _Sample.apply(x, grid), None, None


class Draws:
    """Random numbers for the images of a batch, all from `rng`."""

    def __init__(self, batch_size, rng):
        self.batch_size, self.rng = batch_size, rng

    def uniform(self, low=0.0, high=1.0):
        x = torch.rand(self.batch_size, generator=self.rng, device=self.rng.device)
        return x * (high - low) + low

    def normal(self, deviation):
        x = torch.randn(self.batch_size, generator=self.rng, device=self.rng.device)
        return x * deviation

    def whether(self, probability):
        return self.uniform() < probability

    def integer(self, count):
        size = (self.batch_size,)
        return torch.randint(count, size, generator=self.rng, device=self.rng.device)


def _select(condition, a, b):
    return torch.where(condition[:, None, None, None], a, b)


def draw_blit(draws, p, size):
    """Draw mirroring [B], quarter turns [B] and whole-pixel shifts [B, 2] (pixel blitting)."""
    flip = draws.whether(p) & draws.whether(0.5)
    turns = draws.integer(4) * draws.whether(p)
    shift = torch.stack([draws.uniform(-TRANSLATION, TRANSLATION) for _ in range(2)], dim=1) * size
    return flip, turns, shift.round().long() * draws.whether(p)[:, None]


def blit(images, flip, turns, shift):
    """Mirror, turn and shift images, reflected at the borders; pixels keep their values."""
    B, C, size, _ = images.shape
    images = _select(flip, images.flip(3), images)
    images = _select(turns >= 2, images.flip((2, 3)), images)
    images = _select(turns % 2 == 1, torch.rot90(images, 1, (2, 3)), images)
    index = (torch.arange(size, device=shift.device) - shift[:, :, None]).abs()  # [B, 2, R]
    index = torch.minimum(index, 2 * (size - 1) - index).to(images.device)
    images = images.gather(3, index[:, 0, None, None, :].expand(B, C, size, size))
    return images.gather(2, index[:, 1, None, :, None].expand(B, C, size, size))


def draw_geometry(draws, p):
    """Draw matrices [B, 3, 3] that scale, turn and shift, and which images are changed [B].

    Coordinates (x, y) are in halves of the image's side.
    """
    p_turn = 1 - math.sqrt(1 - p)  # there are two turns: at least one has probability p
    matrix = torch.eye(3, device=draws.rng.device).expand(draws.batch_size, 3, 3)
    applied = torch.zeros(draws.batch_size, dtype=torch.bool, device=matrix.device)

    def then(step, probability):
        nonlocal matrix, applied
        chosen = draws.whether(probability)
        matrix = torch.where(chosen[:, None, None], step @ matrix, matrix)
        applied = applied | chosen

    scale = torch.exp2(draws.normal(SCALE_DEVIATION))
    then(_scaling(scale, scale), p)
    then(_turning(draws.uniform(-math.pi, math.pi)), p_turn)
    scale = torch.exp2(draws.normal(SCALE_DEVIATION))
    then(_scaling(scale, 1 / scale), p)
    then(_turning(draws.uniform(-math.pi, math.pi)), p_turn)
    then(_shifting(2 * draws.normal(TRANSLATION), 2 * draws.normal(TRANSLATION)), p)
    return matrix, applied


def _matrix(*rows):
    tensors = [value for row in rows for value in row if isinstance(value, torch.Tensor)]
    zero = torch.zeros_like(tensors[0])
    return torch.stack([torch.stack([zero + value for value in row], dim=1) for row in rows], dim=1)


def _scaling(x, y):
    return _matrix((x, 0, 0), (0, y, 0), (0, 0, 1 + 0 * x))


def _turning(angle):
    return _matrix((angle.cos(), -angle.sin(), 0), (angle.sin(), angle.cos(), 0), (0, 0, 1))


def _shifting(x, y):
    return _matrix((1, 0, x), (0, 1, y), (0, 0, 1))


def transform(images, matrix, applied):
    """Move images [B, C, R, R] by `matrix` where `applied`, with borders reflected.

    They are sampled at twice the rate, between low-pass filters.
    """
    B, C, size, _ = images.shape
    taps = torch.from_numpy(design_filter(NUM_TAPS, 0.5, 0.4, 2.0)).to(images)
    half = NUM_TAPS // 2
    padded = F.pad(images, (half,) * 4, mode="reflect")
    fine = upsample(padded, taps, 2, (-half, -half - 1))  # [B, C, 2R, 2R]
    backwards = torch.linalg.inv(matrix.double())[:, :2].to(images)
    grid = F.affine_grid(backwards, [B, C, 2 * size, 2 * size], align_corners=False)
    fine = _Sample.apply(fine, grid)
    result = downsample(F.pad(fine, (half - 1,) * 4, mode="reflect"), taps, 2)  # [B, C, R, R]
    return _select(applied, result, images)


def draw_intensity(draws, p):
    """Draw the factor and offset [B] of grey levels: brightness, contrast, inversion."""
    offset = draws.normal(BRIGHTNESS_DEVIATION) * draws.whether(p)
    factor = torch.where(draws.whether(p), torch.exp2(draws.normal(CONTRAST_DEVIATION)), 1.0)
    sign = torch.where(draws.whether(p) & draws.whether(0.5), -1.0, 1.0)
    return factor * sign, offset * factor * sign


def augment(images, p, rng):
    """Transform each of images [B, C, R, R] at random, with probability `p` per transformation.

    The identity for p = 0. Differentiable to any order. `rng` is the only source of randomness.
    """
    if p <= 0:
        return images
    draws = Draws(len(images), rng)
    images = blit(images, *draw_blit(draws, p, images.shape[3]))
    images = transform(images, *draw_geometry(draws, p))
    factor, offset = (x.to(images.dtype)[:, None, None, None] for x in draw_intensity(draws, p))
    return images * factor + offset


class AdaptiveProbability:
    """The probability p that keeps r_t = E[sign D(real)] at `target` (section 3).

    A larger r_t says that the discriminator has begun to learn images by heart. p moves up or down
    by a fixed step every `every_steps` updates, and can go from 0 to 1 in `images_to_one` images.
    With target None, p stays as it is.
    """

    def __init__(self, p, target, images_to_one, every_steps, device="cpu"):
        self.p, self.target = float(p), target
        self.images_to_one, self.every_steps = images_to_one, every_steps
        self.sign_sum = torch.zeros((), device=device)
        self.num_updates = 0

    def update(self, mean_sign, batch_size):
        """Update with the mean sign of a batch's logits of real images, and return p."""
        if self.target is None:
            return self.p
        self.sign_sum = self.sign_sum + mean_sign.detach()
        self.num_updates += 1
        if self.num_updates == self.every_steps:
            r_t = self.sign_sum.item() / self.num_updates
            step = batch_size * self.every_steps / self.images_to_one
            self.p = min(max(self.p + math.copysign(step, r_t - self.target), 0.0), 1.0)
            self.sign_sum, self.num_updates = torch.zeros_like(self.sign_sum), 0
        return self.p

    def state_dict(self):
        return {"p": self.p, "sign_sum": self.sign_sum, "num_updates": self.num_updates}

    def load_state_dict(self, state):
        self.p, self.num_updates = float(state["p"]), int(state["num_updates"])
        self.sign_sum = torch.as_tensor(state["sign_sum"]).to(self.sign_sum)
