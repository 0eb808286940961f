"""Steps larger than the memory: computed in parts, and in smaller ones when the memory is full."""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch


class MicroBatching:
    """Accumulates the gradients of a batch in parts, which are halved when the memory is full.

    The size of the parts belongs into the checkpoint, so that a resumed run sums in the same order;
    a changed `micro_batch_size` overrules it. Each process halves for itself, and the main
    process's size is saved.

    Args:
        micro_batch_size: Images of one process in a part; 0 for its whole batch.
        run: The stage's `TrainingRun`, which prints messages.
        flag: Command-line flag of `micro_batch_size`, for messages.
    """

    def __init__(self, micro_batch_size: int, *, run: Any, flag: str):
        self.configured = self.size = micro_batch_size
        self.run, self.flag = run, flag

    def accumulate(
        self,
        backward: Callable[[Any, float], dict | None],
        batch: Any,
        parameters: Iterable[torch.nn.Parameter],
    ) -> dict:
        """Leave the gradients of `batch` in `parameters`, which have none before.

        When the memory is full, the step starts again with smaller parts and the same random state;
        other changes that `backward` makes must bear that. Random numbers drawn for the whole batch
        do not depend on its parts. Losses that mix images (batch statistics) do.

        Args:
            backward: (part of the batch, its share of the batch) -> {name: tensor}. Computes a mean
                loss over the part and calls `accelerator.backward(loss * share)`. It must be a
                function of its own, whose graph is freed when it fails, and call modules that are
                not wrapped in DistributedDataParallel.
            batch: `em_data.Batch` on the device.

        Returns:
            The outputs, detached: scalars as means over the batch, others joined by images.

        Raises:
            ValueError: If not even one image fits.
        """
        parameters = list(parameters)
        state, largest = _random_state(), min(self.size or len(batch), len(batch))
        size = largest
        while True:
            try:
                results = [
                    (len(part), self._detach(backward(part, len(part) / len(batch))))
                    for part in batch.split(size)
                ]
                break
            except RuntimeError as error:
                for parameter in parameters:
                    parameter.grad = None
                size = halve_batch(size, error, f"{self.run.stage}: one image")
                text = _first_line(error)
            _set_random_state(state)
        if size < largest:
            self.size = size
            self.run.say(
                f"{self.run.stage}: out of memory ({text}). From now on, batches are computed in "
                f"parts of {size} images with accumulated gradients. {self.flag} {size} makes it "
                "permanent.",
                from_any_process=True,
            )
        return _join(results)

    def state_dict(self) -> dict:
        return {"configured": self.configured, "size": self.size}

    def load_state_dict(self, state: dict) -> None:
        if state["configured"] == self.configured:
            self.size = state["size"]

    @staticmethod
    def _detach(outputs: dict | None) -> dict:
        return {name: value.detach() for name, value in (outputs or {}).items()}


def run_in_parts(
    function: Callable[..., torch.Tensor], *tensors: torch.Tensor, size: int
) -> torch.Tensor:
    """Return `function` of `tensors`, computed in parts of `size` rows without gradients.

    When the memory is full, the parts are halved. Raises `ValueError` if one row does not fit.
    """
    size = min(size, len(tensors[0]))
    results, start = [], 0
    with torch.no_grad():
        while start < len(tensors[0]):
            try:
                results.append(function(*(tensor[start : start + size] for tensor in tensors)))
                start += size
            except RuntimeError as error:
                size = halve_batch(size, error)
    return torch.cat(results)


def halve_batch(count: int, error: BaseException, what: str = "one image") -> int:
    """Return half of the `count` images that did not fit, and free their memory.

    Raises:
        ValueError: If not even `what` fits.
        BaseException: `error` itself, if it is no lack of memory.
    """
    if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
        raise error
    if count == 1:
        raise ValueError(
            f"Out of memory: {what} by itself does not fit ({_first_line(error)}). End other "
            "programs on the device, lower --precision, turn on gradient checkpointing if the "
            "stage has it, or choose a smaller model or resolution."
        ) from error
    error.__traceback__ = None  # it holds the tensors that did not fit
    free_memory()
    return count // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` means that the memory of the accelerator or the host is full."""
    texts = (
        "out of memory",
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def free_memory() -> None:
    """Free what no tensor holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _join(results) -> dict:
    if len(results) == 1:
        return results[0][1]
    total = sum(count for count, _ in results)
    outputs = {}
    for name, first in results[0][1].items():
        if first.dim():
            outputs[name] = torch.cat([part[name] for _, part in results])
        else:
            outputs[name] = sum(part[name] * (count / total) for count, part in results)
    return outputs


def _random_state():
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    )


def _set_random_state(state) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def _first_line(error) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
