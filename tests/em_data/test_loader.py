import itertools

import numpy as np
import pytest
import torch

from em_data import BatchLoader, ImageSampler
from em_data.sampler import make_permutation


def test_each_epoch_is_a_permutation_of_all_views():
    sampler = ImageSampler(97, seed=3)
    epochs = [sampler.indices(97 * epoch, 97) for epoch in range(4)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(97))
    assert not np.array_equal(epochs[0], epochs[1])


def test_indices_are_a_pure_function_of_seed_and_position():
    whole = ImageSampler(10, seed=1).indices(0, 1000)
    sampler = ImageSampler(10, seed=1)
    for start, count in [(995, 5), (0, 3), (7, 25), (33, 1), (8, 0), (123, 456)]:  # in no order
        assert np.array_equal(sampler.indices(start, count), whole[start : start + count])
    assert not np.array_equal(ImageSampler(10, seed=2).indices(0, 1000), whole)


def test_permutation_is_the_same_in_every_version():
    assert make_permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_empty_training_side_is_refused():
    with pytest.raises(ValueError, match="empty"):
        ImageSampler(0)


class FakeTiles:
    num_views = 30

    def __len__(self):
        return self.num_views

    def batch(self, view_ids):
        return torch.as_tensor(view_ids, dtype=torch.float32).reshape(-1, 1, 1, 1)


def take(num, **options):
    loader = BatchLoader(FakeTiles(), ImageSampler(30, seed=5), **options)
    batches = list(itertools.islice(loader, num))
    assert all(batch.ids.tolist() == batch.images.flatten().tolist() for batch in batches)
    return [batch.ids.tolist() for batch in batches]


def test_ranks_share_the_batch_of_one_process():
    alone = take(20, batch_size=8)
    parts = [take(20, batch_size=8, rank=rank, world_size=2) for rank in range(2)]
    assert alone == [first + second for first, second in zip(*parts)]


def test_loader_starts_anywhere():
    assert take(3, batch_size=8, start=7 * 8) == take(10, batch_size=8)[7:]


@pytest.mark.parametrize(
    "options", [{"batch_size": 9, "world_size": 2}, {"batch_size": 8, "rank": 2, "world_size": 2}]
)
def test_batch_that_cannot_be_shared_is_refused(options):
    with pytest.raises(ValueError, match="process"):
        BatchLoader(FakeTiles(), ImageSampler(30), **options)
