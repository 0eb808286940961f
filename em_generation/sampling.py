"""Numbers -> images, batch by batch: drawn and written at once, in smaller batches if need be.

Image i depends on (seed, i) alone, whatever the batches. Seeding a generator for each image costs
little: 32 microseconds for a noise of 4 x 32 x 32, so 2 s for 50,000 images.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from em_training.family import EXACT_BATCH, Drawer
from em_training.memory import halve_batch
from em_training.saved_models import explain_failure

MAX_WAITING = 2  # batches that are drawn but not written


def draw_images(
    drawer: Drawer,
    numbers: Sequence[int],
    write: Callable[[Sequence[int], torch.Tensor], int],
    *,
    batch_size: int,
    num_writers: int = 1,
    progress: Callable[[int], object] = lambda count: None,
    say: Callable[[str], object] = print,
) -> int:
    """Draw the images `numbers` and hand them over; return the batch size that fits the memory.

    Args:
        write: Gets (numbers, images float32 [B, 1, H, W] in [-1, 1] on the CPU), from `num_writers`
            threads. It returns how many images are safe.
        progress: Gets that number, from this thread.
        say: Gets a message when the memory runs out and smaller batches follow.

    Raises:
        ValueError: An image is not finite, not even one fits the memory, or the model cannot run.
    """
    numbers = list(numbers)
    waiting: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(num_writers) as pool:
        try:
            position, is_smaller = 0, False
            while position < len(numbers):
                batch = numbers[position : position + batch_size]
                try:
                    with explain_failure():
                        images = drawer.draw(pad(batch, batch_size, drawer.fixed_batch))
                except (RuntimeError, MemoryError) as error:
                    batch_size, is_smaller = halve_batch(len(batch), error), True
                    continue
                if is_smaller:
                    is_smaller = False
                    say(f"out of memory: going on with --batch-size {batch_size}")
                position += len(batch)
                host = to_host(images[: len(batch)])
                waiting.append(pool.submit(write_when_ready, write, batch, *host))
                while len(waiting) > MAX_WAITING or (waiting and waiting[0].done()):
                    progress(waiting.popleft().result())
            while waiting:
                progress(waiting.popleft().result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return batch_size


def pad(numbers: list[int], batch_size: int, fixed: bool) -> list[int]:
    """Repeat the last number up to a batch whose images are those of a full batch, bit for bit."""
    size = batch_size if fixed else min(batch_size, EXACT_BATCH)
    return numbers + numbers[-1:] * (size - len(numbers))


def to_host(images: torch.Tensor):
    """Return (images on the CPU, event): on a GPU the copy is complete when the event comes."""
    if images.device.type != "cuda":
        return images.float().cpu(), None
    host = torch.empty(images.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(images, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def write_when_ready(write, numbers, images, event) -> int:
    """Wait for the device, refuse images that are not finite, and write the others."""
    if event is not None:
        event.synchronize()
    if not torch.isfinite(images).all():
        raise ValueError(
            f"Images {numbers[0]} to {numbers[-1]} are not finite: the model diverged."
        )
    return write(numbers, images)
