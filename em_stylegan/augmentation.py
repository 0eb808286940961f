"""Adaptive augmentation of what the discriminator sees: pixel blitting, geometry and intensity for grey images (Karras et al. 2020, ADA).

Real and generated images pass the same random transformations, each applied with probability p, so that a discriminator with few images
cannot learn them by heart. While p stays below 1 an image is often enough left as it is for the generator to learn the distribution without
augmentation: the augmentations do not leak (section 2 and appendix C).
"""

import math

import torch
import torch.nn.functional as F

from em_stylegan.em_stylegan3_generator import design_filter, downsample, upsample

TRANSLATION = (
    0.125  # of the image's side: largest whole-pixel shift, deviation of the fractional one
)
SCALE_DEVIATION = 0.2  # of log2
BRIGHTNESS_DEVIATION = 0.2  # of a range of 2
CONTRAST_DEVIATION = 0.5  # of log2
NUM_TAPS = 12


class _Sample(torch.autograd.Function):
    """Bilinear samples of x [B, C, H, W] at grid [B, H', W', 2], reflected at the borders; linear in x, so that derivatives of any order
    are this and its adjoint, where torch's own stops at the first."""

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
        empty = y.new_empty(()).expand(shape)  # the adjoint reads its shape alone
        return torch.ops.aten.grid_sampler_2d_backward(
            y.contiguous(), empty, grid, 0, 2, False, (True, False)
        )[0]

    @staticmethod
    def backward(ctx, x):
        (grid,) = ctx.saved_tensors
        return _Sample.apply(x, grid), None, None


class Draws:
    """Random decisions and numbers for a batch, all from one torch.Generator."""

    def __init__(self, batch_size, generator):
        self.batch_size, self.generator = batch_size, generator

    def uniform(self, low=0.0, high=1.0):
        return (
            torch.rand(self.batch_size, generator=self.generator, device=self.generator.device)
            * (high - low)
            + low
        )

    def normal(self, deviation):
        return (
            torch.randn(self.batch_size, generator=self.generator, device=self.generator.device)
            * deviation
        )

    def whether(self, probability):
        return self.uniform() < probability

    def integer(self, count):
        return torch.randint(
            count, (self.batch_size,), generator=self.generator, device=self.generator.device
        )


def _select(condition, a, b):
    return torch.where(condition[:, None, None, None], a, b)


def draw_blit(draws, p, size):
    """Whether to mirror [B], quarter turns [B], whole-pixel shifts [B, 2]: what pixel blitting does to each image."""
    flip = draws.whether(p) & draws.whether(0.5)
    turns = draws.integer(4) * draws.whether(p)
    shift = torch.stack([draws.uniform(-TRANSLATION, TRANSLATION) for _ in range(2)], dim=1) * size
    return flip, turns, shift.round().long() * draws.whether(p)[:, None]


def blit(images, flip, turns, shift):
    """Mirror, turn by quarters and shift (reflected at the borders); every pixel keeps its value."""
    B, C, size, _ = images.shape
    images = _select(flip, images.flip(3), images)
    images = _select(turns >= 2, images.flip((2, 3)), images)
    images = _select(turns % 2 == 1, torch.rot90(images, 1, (2, 3)), images)
    index = (torch.arange(size, device=shift.device) - shift[:, :, None]).abs()  # [B, 2, R]
    index = torch.minimum(index, 2 * (size - 1) - index).to(images.device)
    images = images.gather(3, index[:, 0, None, None, :].expand(B, C, size, size))
    return images.gather(2, index[:, 1, None, :, None].expand(B, C, size, size))


def draw_geometry(draws, p):
    """The matrices [B, 3, 3] of scaling, turning and shifting, (x, y) in halves of the image's side, and which images have any [B]."""
    p_turn = 1 - math.sqrt(1 - p)  # two turns, of which one at least with probability p
    matrix = torch.eye(3, device=draws.generator.device).expand(draws.batch_size, 3, 3)
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
    zero = torch.zeros_like(
        next(value for row in rows for value in row if isinstance(value, torch.Tensor))
    )
    return torch.stack([torch.stack([zero + value for value in row], dim=1) for row in rows], dim=1)


def _scaling(x, y):
    return _matrix((x, 0, 0), (0, y, 0), (0, 0, 1 + 0 * x))


def _turning(angle):
    return _matrix((angle.cos(), -angle.sin(), 0), (angle.sin(), angle.cos(), 0), (0, 0, 1))


def _shifting(x, y):
    return _matrix((1, 0, x), (0, 1, y), (0, 0, 1))


def transform(images, matrix, applied):
    """Images [B, C, R, R] moved by `matrix` where `applied`: sampled at twice the rate between low-pass filters, borders reflected."""
    B, C, size, _ = images.shape
    taps = torch.from_numpy(design_filter(NUM_TAPS, 0.5, 0.4, 2.0)).to(images)
    half = NUM_TAPS // 2
    fine = upsample(
        F.pad(images, (half,) * 4, mode="reflect"), taps, 2, (-half, -half - 1)
    )  # [B, C, 2R, 2R]
    backwards = torch.linalg.inv(matrix.double())[:, :2].to(images)
    grid = F.affine_grid(backwards, [B, C, 2 * size, 2 * size], align_corners=False)
    fine = _Sample.apply(fine, grid)
    result = downsample(F.pad(fine, (half - 1,) * 4, mode="reflect"), taps, 2)  # [B, C, R, R]
    return _select(applied, result, images)


def draw_intensity(draws, p):
    """Factor and offset [B] of each image's grey values: brightness, contrast, and inversion."""
    offset = draws.normal(BRIGHTNESS_DEVIATION) * draws.whether(p)
    factor = torch.where(draws.whether(p), torch.exp2(draws.normal(CONTRAST_DEVIATION)), 1.0)
    sign = torch.where(draws.whether(p) & draws.whether(0.5), -1.0, 1.0)
    return factor * sign, offset * factor * sign


def augment(images, p, generator):
    """Transform each of images [B, C, R, R] at random, every transformation with probability `p`; the identity for p = 0.

    Differentiable to any order. All randomness is `generator`'s.
    """
    if p <= 0:
        return images
    draws = Draws(len(images), generator)
    images = blit(images, *draw_blit(draws, p, images.shape[3]))
    images = transform(images, *draw_geometry(draws, p))
    factor, offset = (
        value.to(images.dtype)[:, None, None, None] for value in draw_intensity(draws, p)
    )
    return images * factor + offset


class AdaptiveProbability:
    """The p that keeps r_t = E[sign D(real)] at `target`: a discriminator surer than that has begun to learn images by heart (section 3).

    p moves by a fixed step, up or down, every `every_steps` updates, fast enough to go from 0 to 1 in `images_to_one` images. With target
    None, p stays what it is.
    """

    def __init__(self, p, target, images_to_one, every_steps, device="cpu"):
        self.p, self.target = float(p), target
        self.images_to_one, self.every_steps = images_to_one, every_steps
        self.sign_sum = torch.zeros((), device=device)
        self.num_updates = 0

    def update(self, mean_sign, batch_size):
        """Take in the mean sign of a batch's logits of real images; returns p."""
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
