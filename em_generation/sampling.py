"""Numbers -> images, batch by batch: denoising, decoding and writing at once, smaller batches when the memory runs out.

Image i comes from generators of its own, seeded by (seed, i). Drawing a noise of 4 x 32 x 32 so takes 32 microseconds, less than
its share of one large draw, so 50,000 images spend 2 s on it; the grain of 256 x 256 takes 0.7 ms, 35 s of them, drawn on the CPU while
the device computes.
"""

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from em_training import is_out_of_memory, seed_for
from em_training.memory import free_memory

# the libraries compute a row of a batch in one way from this size on (seen with oneDNN and MKL on AVX-512), in others below
EXACT_BATCH = 16
DECODED_PIXELS = (
    2**20
)  # at a time: 16 images of 256 x 256; larger batches gain nothing and take much memory
MAX_WAITING = 2  # batches that are decoded but not written


@dataclass
class Sampling:
    """How images are made: settings of one process, and what has been learnt on the way.

    call: arguments of the pipeline beside batch size and generators; for an LDM those of its denoising. add_grain: whether an LDM adds
    its grain after decoding. batch_size, decode_batch_size: images at once, halved when
    the memory runs out. pad: compute every batch in full size, as compiled models want it.
    """

    pipeline: object
    family: str
    seed: int
    batch_size: int
    decode_batch_size: int
    call: dict = field(default_factory=dict)
    pad: bool = False
    add_grain: bool = True
    say: Callable[[str], None] = print
    _unsaid: dict = field(default_factory=dict)
    _has_said_grey: bool = False

    def generate(
        self,
        numbers: list[int],
        write: Callable,
        *,
        num_writers: int,
        progress: Callable[[int], None],
    ) -> None:
        """Make the images `numbers` and hand them to `write(numbers, images)`, float32 [B, 1, H, W] in [-1, 1] on the CPU; of a colour
        StyleGAN, the mean of its channels.

        write: called from `num_writers` threads; returns how many images are safe. progress: gets that number, from this thread.
        """
        waiting: collections.deque[list[Future]] = collections.deque()
        with ThreadPoolExecutor(num_writers) as pool:
            try:
                position = 0
                while position < len(numbers):
                    batch = numbers[position : position + self.batch_size]
                    parts = self._try_batch(batch)
                    if parts is None:
                        continue  # the memory ran out: again, with a smaller batch
                    position += len(batch)
                    self._say_what_changed()
                    waiting.append([pool.submit(write_when_ready, write, *part) for part in parts])
                    while len(waiting) > MAX_WAITING or (
                        waiting and all(job.done() for job in waiting[0])
                    ):
                        progress(sum(job.result() for job in waiting.popleft()))
                while waiting:
                    progress(sum(job.result() for job in waiting.popleft()))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _try_batch(self, numbers):
        """[(numbers, images, event)] of a batch; None after halving the batch because the memory ran out."""
        try:
            generators = self._seed(numbers)
            latents = self._denoise(numbers, generators) if self.family == "ldm" else None
        except (RuntimeError, MemoryError) as error:
            self._halve("batch_size", len(numbers), error)
            return None
        if latents is not None:
            return self._decode(numbers, latents, generators)
        try:
            images = self.pipeline(
                batch_size=self._padded(numbers), generator=generators, **self.call
            ).images
        except (RuntimeError, MemoryError) as error:
            self._halve("batch_size", len(numbers), error)
            return None
        return [(numbers, *to_host(self._to_grey(images[: len(numbers)]) * 2 - 1))]

    def _to_grey(self, images):
        """The mean of a colour StyleGAN's channels; ours have one."""
        if images.shape[1] == 1:
            return images
        if not self._has_said_grey:
            self._has_said_grey = True
            self.say(
                f"the generator makes images of {images.shape[1]} channels: their mean is written, as grey"
            )
        return images.mean(dim=1, keepdim=True)

    def _denoise(self, numbers, generators):
        latents = self.pipeline.denoise(self._padded(numbers), generators, **self.call)
        return latents[: len(numbers)]

    def _decode(self, numbers, latents, generators):
        """Decode on a stream of its own, while the next batch is denoised on the other.

        The grain goes on where the denoising left the generators, or copies of them, since a part may be decoded a second time.
        """
        stream = decoding_stream(latents.device)
        parts, position = [], 0
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            latents.record_stream(stream)
        while position < len(numbers):
            part = numbers[position : position + self.decode_batch_size]
            try:
                with torch.cuda.stream(stream):  # does nothing for None
                    rows = latents[position : position + len(part)]
                    mine = [
                        each.clone_state() for each in generators[position : position + len(part)]
                    ]
                    padding = self._padded(part, self.decode_batch_size) - len(part)
                    if padding:
                        rows = torch.cat([rows, rows[-1:].expand(padding, -1, -1, -1)])
                        mine += [mine[-1].clone_state() for _ in range(padding)]
                    images = self.pipeline.decode(rows, mine, self.add_grain)
                    parts.append((part, *to_host(images[: len(part)])))
            except (RuntimeError, MemoryError) as error:
                self._halve("decode_batch_size", len(part), error)
                continue
            position += len(part)
        return parts

    def _padded(self, numbers, batch_size=None):
        """How many images to compute for these: a few more where that makes them the same, bit for bit, as in a full batch."""
        batch_size = batch_size or self.batch_size
        return batch_size if self.pad else max(len(numbers), min(batch_size, EXACT_BATCH))

    def _seed(self, numbers):
        """A generator for each image, of its own seed; those that fill the batch repeat the last image's."""
        device = "cpu" if self.family == "ldm" else self.pipeline.device
        padded = numbers + numbers[-1:] * (self._padded(numbers) - len(numbers))
        return [torch.Generator(device).manual_seed(seed_for(self.seed, i)) for i in padded]

    def _halve(self, name, count, error):
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise error
        if count == 1:
            raise ValueError(
                f"out of memory: not even one image fits ({str(error).splitlines()[0]}). End other programs on the device, or "
                "lower --precision."
            ) from error
        error.__traceback__ = None  # holds the tensors that did not fit
        free_memory()
        setattr(self, name, max(1, min(count, getattr(self, name)) // 2))
        self._unsaid[name] = getattr(self, name)

    def _say_what_changed(self):
        """Say once, when a batch has succeeded, where the halving ended."""
        if self._unsaid:
            flags = " ".join(
                f"--{name.replace('_', '-')} {size}" for name, size in self._unsaid.items()
            )
            self.say(f"out of memory: going on with {flags}")
            self._unsaid.clear()


def to_host(images):
    """(images float32 on the CPU, event): on a GPU the copy is under way until the event has come."""
    if images.device.type != "cuda":
        return images.float().cpu(), None
    host = torch.empty(images.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(images.float(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def write_when_ready(write, numbers, images, event):
    """`write`, after the device has delivered the images."""
    if event is not None:
        event.synchronize()
    return write(numbers, images)


_STREAMS: dict = {}


def decoding_stream(device):
    """The second stream of a GPU; None on other devices, where nothing runs beside the caller."""
    if device.type != "cuda":
        return None
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
