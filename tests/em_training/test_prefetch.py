import itertools
import threading
import time

import pytest
import torch

from em_data.batch import Batch
from em_training import Prefetcher


def draw(count, error=None):
    for i in range(count):
        yield Batch(torch.full((2, 3, 4, 4), float(i)), torch.tensor([i, i]))
    if error:
        raise error


@pytest.mark.parametrize("threaded", [False, True])
def test_every_batch_comes_once_in_order_then_the_end(threaded):
    with Prefetcher(draw(7), "cpu", threaded=threaded) as batches:
        for i, batch in enumerate(batches):
            assert (batch.images == i).all()
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.ids.tolist() == [i, i]
            assert batch.noise is None
    assert i == 6


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_comes_in_the_place_of_its_batch(threaded):
    with Prefetcher(draw(3, ValueError("a broken tile")), "cpu", threaded=threaded) as batches:
        for _ in range(3):
            next(batches)
        with pytest.raises(ValueError, match="a broken tile"):
            next(batches)


def test_batches_are_drawn_ahead_but_not_without_end():
    drawn = []
    batch = Batch(torch.zeros(1), torch.zeros(1))
    endless = (drawn.append(i) or batch for i in itertools.count())
    with Prefetcher(endless, "cpu", threaded=True, depth=2) as batches:
        next(batches)
        for _ in range(100):
            if len(drawn) == 4:
                break
            time.sleep(0.02)
        time.sleep(0.1)
        assert len(drawn) == 4  # the one taken, two in the queue, one in the thread's hand


def test_the_thread_ends_with_the_loop():
    def stop():
        with Prefetcher(draw(1000), "cpu", threaded=True) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
