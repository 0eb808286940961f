"""A small U-Net that finds defects: trained on labelled crops, instances by watershed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass
from scipy import ndimage
from skimage.segmentation import watershed
from torch import nn
from torch.nn import functional as F

from em_data.micrograph import Defect
from em_evaluation.detector.augmentation import change_levels, distort, paste, turn
from em_evaluation.detector.labelled import (
    Instance,
    LabelledImage,
    cut_instances,
    draw_targets,
)

THRESHOLD = 0.5  # of masks and cores
LEAST_SCORE = 0.75  # of a defect: the greatest share in its core
LEAST_AREA_PX = 4  # smaller objects are neither found nor missed


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SegmenterConfig:
    """The network and its training, the same for all training sets that are compared."""

    widths: tuple[int, ...] = (24, 48, 96)
    """Channels at each scale; the first scale has half the pixels a side of the image."""
    crop_px: int = 64
    """Side of the square crops to train on."""
    num_steps: int = 600
    """Steps of the optimizer."""
    batch_size: int = 4
    """Crops per step."""
    learning_rate: float = 5e-3
    """Largest learning rate of the cosine schedule with warm-up."""
    weight_decay: float = 1e-3
    """Of AdamW."""


class SmallUNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) that is fast on one core.

    Squares of 2 x 2 pixels become channels at the entrance, and channels become squares at the
    exit (Shi et al. 2016): no pixel is lost, and the first scale costs a quarter. It takes grey
    levels [B, 1, H, W], sides divisible by 2 ** len(widths), and returns logits
    [B, num_outputs, H, W].
    """

    def __init__(self, widths: Sequence[int], num_outputs: int):
        super().__init__()
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(_make_block(a, b) for a, b in [(4, widths[0]), *pairs])
        self.up = nn.ModuleList(_make_block(a + b, a) for a, b in reversed(pairs))
        self.out = nn.Conv2d(widths[0], 4 * num_outputs, 1)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias, -2.0)  # most pixels show no defect

    def forward(self, x):
        x, skips = F.pixel_unshuffle(x, 2), []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for block, skip in zip(self.up, reversed(skips[:-1])):
            x = block(torch.cat([skip, F.interpolate(x, scale_factor=2.0)], 1))
        return F.pixel_shuffle(self.out(x), 2)


def _make_block(num_in, num_out):
    layers = []
    for channels in (num_in, num_out):
        conv = nn.Conv2d(channels, num_out, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


@dataclass(eq=False)
class TrainingSet:
    """Labelled images to draw crops from, with the work done that all trainings share."""

    channels: list[np.ndarray]  # of each image, float32 [1 + 2 K, H, W]: levels, masks, cores
    instances: list[list[Instance]]  # of each image, to paste

    @classmethod
    def from_images(cls, images: Sequence[LabelledImage], kinds: Sequence[str]) -> "TrainingSet":
        """Prepare images; defects of other kinds are not learned."""
        channels = [
            np.concatenate([each.levels[None], draw_targets(each.image.shape, each.defects, kinds)])
            for each in images
        ]
        return cls(channels, [cut_instances(each, kinds) for each in images])

    def __len__(self) -> int:
        return len(self.channels)

    def select(self, indices: Sequence[int]) -> "TrainingSet":
        """Return the set of some images."""
        return TrainingSet(
            [self.channels[i] for i in indices], [self.instances[i] for i in indices]
        )

    def list_instances(self) -> list[Instance]:
        """Return the instances of all images."""
        return [each for instances in self.instances for each in instances]

    def draw_crop(self, side: int, rng: np.random.Generator) -> np.ndarray:
        """Return a random crop [1 + 2 K, side, side]; a smaller image is continued by mirroring."""
        whole = self.channels[rng.integers(len(self.channels))]
        missing = [max(0, side - length) for length in whole.shape[1:]]
        if any(missing):
            whole = np.pad(whole, ((0, 0), (0, missing[0]), (0, missing[1])), "symmetric")
        y, x = (rng.integers(length - side + 1) for length in whole.shape[1:])
        return whole[:, y : y + side, x : x + side].copy()


def train_segmenter(
    real: TrainingSet,
    kinds: Sequence[str],
    config: SegmenterConfig,
    *,
    synthetic: TrainingSet | None = None,
    synthetic_share: float = 0.5,
    is_strong: bool = True,
    seed: int = 0,
) -> "Segmenter":
    """Train a segmenter for `config.num_steps` steps; equal arguments give equal weights.

    Args:
        real: Labelled images; may be empty if there are synthetic ones.
        kinds: Kinds of defects to find.
        config: `SegmenterConfig`.
        synthetic: More labelled images, such as generated ones, of which each batch holds a share.
        synthetic_share: That share at the start, 0 to 1. It falls linearly to 0 at the last step,
            so that the segmenter ends on real images. Without real images it is 1.
        is_strong: Use strong classical augmentation with copy-paste, not only flips and turns.
        seed: Of the first weights, the crops and the augmentation.

    Raises:
        ValueError: There is no image to train on.
    """
    sets = [each for each in (real, synthetic) if each]
    if not sets:
        raise ValueError("There is no labelled image to train a segmenter on.")
    instances = sets[0].list_instances() if is_strong else []
    rng, torch_rng = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallUNet(config.widths, 2 * len(kinds))
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.num_steps, pct_start=0.15
    )
    for step in range(config.num_steps):
        share = synthetic_share * (1 - step / config.num_steps) if len(sets) == 2 else 0.0
        batch = draw_batch(sets, share, config, instances, rng)
        if is_strong:
            batch = distort(batch, torch_rng)
            batch = torch.cat([change_levels(batch[:, :1], torch_rng), batch[:, 1:]], 1)
        logits = network(batch[:, :1].contiguous(memory_format=torch.channels_last))
        loss = compute_loss(logits, batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Segmenter(network.eval(), tuple(kinds))


def draw_batch(sets, share, config, instances, rng) -> torch.Tensor:
    """Return crops [B, 1 + 2 K, S, S] of one or two `TrainingSet`, turned, with pasted instances.

    Each crop is of the second set with probability `share`.
    """
    crops = []
    for _ in range(config.batch_size):
        chosen = sets[int(rng.random() < share)]
        crop = np.ascontiguousarray(turn(chosen.draw_crop(config.crop_px, rng), rng))
        paste(crop, instances, rng)
        crops.append(torch.from_numpy(crop))
    return torch.stack(crops)


def compute_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy plus one less the soft Dice overlap of each channel [B, 2 K, H, W]."""
    shares = torch.sigmoid(logits)
    overlap = 2 * (shares * targets).sum((0, 2, 3)) + 1
    dice = overlap / (shares.sum((0, 2, 3)) + targets.sum((0, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, targets) + (1 - dice).mean()


@dataclass(eq=False)
class Segmenter:
    """A trained network and the kinds that it finds."""

    network: SmallUNet
    kinds: tuple[str, ...]

    @torch.no_grad()
    def find(self, image: LabelledImage) -> list[Defect]:
        """Return the defects found in an image, with masks and metadata["score"] from 0 to 1.

        Masks of one kind do not overlap. The labels of the image are not looked at.
        """
        levels = torch.from_numpy(image.levels)[None, None]
        height, width = image.image.shape
        step = 2 ** len(self.network.down)
        padding = (0, -width % step, 0, -height % step)
        logits = self.network(F.pad(levels, padding, mode="replicate"))[0, :, :height, :width]
        shares = torch.sigmoid(logits).numpy().reshape(2, len(self.kinds), height, width)
        found = []
        for kind, mask_share, core_share in zip(self.kinds, *shares):
            found += separate(kind, mask_share, core_share)
        return found


def separate(kind: str, mask_share: np.ndarray, core_share: np.ndarray) -> list[Defect]:
    """Return the instances of one kind from two maps of shares, float32 [H, W] from 0 to 1.

    A watershed from the cores parts defects that touch. A mask without a clear core is none: most
    of these are fragments.
    """
    mask = mask_share > THRESHOLD
    seeds, num = ndimage.label(mask & (core_share > THRESHOLD), np.ones((3, 3)))
    scores = ndimage.maximum(core_share, seeds, np.arange(1, num + 1)) if num else np.zeros(0)
    is_clear = np.concatenate([[False], np.asarray(scores) >= LEAST_SCORE])
    labels = watershed(-mask_share, np.where(is_clear[seeds], seeds, 0), mask=mask)
    found = []
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        if place is None:
            continue
        inside = labels[place] == number
        if np.count_nonzero(inside) >= LEAST_AREA_PX:
            (y0, y1), (x0, x1) = ((each.start, each.stop) for each in place)
            metadata = {"score": float(scores[number - 1])}
            found.append(Defect(kind, (x0, y0, x1, y1), inside, metadata=metadata))
    return found
