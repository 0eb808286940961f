"""Batches made ready while the step before them computes."""

import queue
import threading

import torch


class Prefetcher:
    """Iterates over tuples of tensors of `batches` on `device`, images [B, C, H, W] channels-last; a context manager.

    threaded: draw them ahead, up to `depth`, in a thread that lays them out in pinned memory, from which copies do not wait; by default
    where the device is not the CPU, whose cores the step itself needs. What comes, and in what order, is the same. An error in
    `batches` is raised by the `next` that would have had its batch.
    """

    def __init__(self, batches, device, *, depth: int = 2, threaded: bool | None = None):
        self.batches, self.device = iter(batches), torch.device(device)
        self.threaded = self.device.type != "cpu" if threaded is None else threaded
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="prefetch", daemon=True)

    def __enter__(self):
        if self.threaded:
            self._thread.start()
        return self

    def __exit__(self, kind, error, traceback):
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def __iter__(self):
        return self

    def __next__(self):
        if not self.threaded:
            return self._to_device(next(self.batches))
        batch, error = self._queue.get()
        if error is not None:
            raise error
        return self._to_device(batch)

    def _to_device(self, batch):
        return tuple(
            tensor.to(
                self.device,
                non_blocking=True,
                memory_format=torch.channels_last if tensor.dim() == 4 else torch.preserve_format,
            )
            for tensor in batch
        )

    def _draw(self) -> None:
        while not self._stop.is_set():
            try:
                item = tuple(self._prepare(tensor) for tensor in next(self.batches)), None
            except (
                BaseException
            ) as error:  # StopIteration too: to the reader, not to the thread's end
                item = None, error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return

    def _prepare(self, tensor):
        tensor = (
            tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        )
        return tensor.pin_memory() if self.device.type == "cuda" else tensor
