"""Batches that are made ready while the step before them computes."""

import queue
import threading
from collections.abc import Iterable
from typing import Any, Self

import torch


class Prefetcher:
    """Iterates over `batches` on `device`, their images channels-last; a context manager.

    The order is that of `batches`. An error in `batches` is raised in place of its batch.

    Args:
        batches: Iterable of `em_data.Batch`.
        depth: Batches drawn ahead at most.
        threaded: Draw them in a thread, into pinned memory that is copied without waiting. Default:
            unless the device is the CPU, whose cores the step needs.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        device: str | torch.device,
        *,
        depth: int = 2,
        threaded: bool | None = None,
    ):
        self.batches, self.device = iter(batches), torch.device(device)
        self.threaded = self.device.type != "cpu" if threaded is None else threaded
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        if self.threaded:
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if not self.threaded:
            return next(self.batches).map(self._to_device)
        batch, error = self._queue.get()
        if error is not None:
            raise error
        return batch.map(self._to_device)

    def _to_device(self, tensor):
        return tensor.to(self.device, non_blocking=True, memory_format=_layout(tensor))

    def _pin(self, tensor):
        tensor = tensor.contiguous(memory_format=_layout(tensor))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _draw(self) -> None:
        error = None
        while error is None and not self._stop.is_set():
            batch = None
            try:
                batch = next(self.batches).map(self._pin)
            except BaseException as raised:  # StopIteration, too: it belongs to the reader
                error = raised
            while not self._stop.is_set():
                try:
                    self._queue.put((batch, error), timeout=0.1)
                    break
                except queue.Full:
                    continue


def _layout(tensor):
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
