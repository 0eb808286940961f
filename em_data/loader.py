"""Batches for training."""

from collections.abc import Callable, Iterator

import torch

from em_data.batch import Batch
from em_data.images import TrainingViews
from em_data.sampler import ImageSampler
from em_data.tiles import Tiles

FEW_MICROGRAPHS, MANY_REPEATS = 20, 200


def warn_if_few(summary: dict, num_views: int, num_images: int, log: Callable[[str], None]) -> None:
    """Say through `log` when a training repeats few micrographs very often.

    Args:
        summary: `Data.summary`.
        num_views: Views to train on.
        num_images: Images of the training, repetitions counted.
    """
    num_micrographs, repeats = summary["num_micrographs"], num_images / num_views
    if num_micrographs < FEW_MICROGRAPHS and repeats > MANY_REPEATS:
        log(
            f"Only {num_micrographs} micrographs for {num_images:,} training images: each view is "
            f"shown about {repeats:,.0f} times, and the model may copy it. Add micrographs, or "
            "train on fewer images (num-images)."
        )


class BatchLoader:
    """Iterates forever over the batches of one process.

    Together, the processes take positions start, start + 1, ... of the sampler, so that the images
    do not depend on the number of processes. A batch is gathered from a memory map, which takes far
    less time than a training step; worker processes are not needed.

    Args:
        views: `Tiles` or latents of them.
        sampler: `ImageSampler` over the same views.
        batch_size: Global batch size; a process's batch is batch_size // world_size.
        start: Images seen before the first batch.
        with_masks: Fill `Batch.masks`.
        labels: `Tiles` with the labels of the views, by the same ids. Default: the views, if they
            are tiles. `Batch.class_labels` is filled where they have classes.
    """

    def __init__(
        self,
        views: TrainingViews,
        sampler: ImageSampler,
        *,
        batch_size: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        with_masks: bool = False,
        labels: Tiles | None = None,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size is {batch_size}, but must be a multiple of the {world_size} processes"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, but there are {world_size} processes")
        if sampler.num_views != views.num_views:
            raise ValueError(
                f"the sampler has {sampler.num_views} views, but the data {views.num_views}"
            )
        labels = views if labels is None and isinstance(views, Tiles) else labels
        if labels is not None and labels.num_views != views.num_views:
            raise ValueError(
                f"there are labels of {labels.num_views} views, but the data have {views.num_views}"
            )
        if with_masks and (labels is None or not labels.kinds):
            raise ValueError("with_masks is True, but nothing in the data is labelled.")
        self.views, self.sampler = views, sampler
        self.labels, self.with_masks = labels, with_masks
        self.batch_size, self.start = batch_size, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        local_size = self.batch_size // self.world_size
        position = self.start + self.rank * local_size
        while True:
            ids = self.sampler.indices(position, local_size)
            yield Batch(
                images=self.views.batch(ids),
                ids=torch.from_numpy(ids),
                class_labels=self.labels.class_labels(ids) if self.labels else None,
                masks=self.labels.masks(ids) if self.labels and self.with_masks else None,
            )
            position += self.batch_size
