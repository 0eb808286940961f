"""Steps larger than the memory: computed in parts with accumulated gradients, and halved when the memory runs out."""

import gc

import torch

BUCKET_BYTES = 25 * 2**20  # of gradients that travel between processes in one piece


class MicroBatching:
    """Computes the gradients of a step in parts of `size` images, and in parts half as large when the memory runs out.

    micro_batch_size: images of one process in one part; 0 for its whole batch. run: the stage's `TrainingRun`, which says what happened.
    flag: the command-line flag of `micro_batch_size`, named to the user.

    The size is part of the checkpoint (of the main process; each process halves by itself), so that a resumed run sums in the same
    order; a `micro_batch_size` changed by hand overrules it.
    """

    def __init__(self, micro_batch_size: int, *, run, flag: str):
        if micro_batch_size < 0:
            raise ValueError(
                f"{flag} is {micro_batch_size}; it must be at least 1 image, or 0 for the whole batch"
            )
        self.configured = self.size = micro_batch_size
        self.run, self.flag = run, flag

    def backward(self, compute, parameters, *tensors, average: bool = True):
        """Leave the gradients of a step in `parameters`: of all images, averaged over processes; return (loss, outputs).

        compute: (part of each tensor) -> the part's mean loss, or (loss, {name: tensor}). tensors: images, noise, labels: whatever has
        an image a row, [B, ...], random numbers included: drawn for the whole batch, they do not depend on its parts. `parameters` have
        no gradient before. A loss that is a mean over images gets the gradients of the whole batch but for rounding; one that mixes
        images (batch statistics) is another in parts.

        The loss and scalar outputs come as means over the images of this process, other outputs joined along their first dimension; all
        without a graph. When the memory runs out, the step is done again from its start, random state included; what `compute` changes
        beside gradients must bear that. Raises `ValueError` when not even one image fits.

        average: over processes; without it, none waits for another. `compute` calls modules that are not wrapped in
        DistributedDataParallel: its hooks would wait for a process that began again. Gradients are reduced here, once, after the parts.
        """
        parameters = list(parameters)
        batch_size = len(tensors[0])
        state = _random_state()
        size = min(self.size or batch_size, batch_size)
        while True:
            try:
                results = self._accumulate(compute, tensors, size)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise ValueError(
                        _advise(f"{self.run.stage}: one image by itself does not fit", error)
                    ) from error
                text = _first_line(error)
            # outside of `except`, whose error holds the graph
            for parameter in parameters:
                parameter.grad = None
            free_memory()
            _set_random_state(state)
            size = max(1, size // 2)
        if size < min(self.size or batch_size, batch_size):
            self.size = size
            self.run.say(
                f"{self.run.stage}: out of memory ({text}). The step was done again in parts of {size} images with accumulated "
                f"gradients, and the run goes on so; {self.flag} {size} makes it permanent.",
                from_any_process=True,
            )
        if average and self.run.accelerator.num_processes > 1:
            average_gradients(parameters)
        return _join(results, batch_size)

    def _accumulate(self, compute, tensors, size: int) -> list:
        batch_size = len(tensors[0])
        results = []
        for part in zip(*(tensor.split(size) for tensor in tensors)):
            result = compute(*part)
            loss, outputs = result if isinstance(result, tuple) else (result, {})
            count = len(part[0])
            self.run.accelerator.backward(
                loss if count == batch_size else loss * (count / batch_size)
            )
            outputs = {name: value.detach() for name, value in outputs.items()}
            results.append((count, loss.detach(), outputs))
            del result, loss
        return results

    def state_dict(self) -> dict:
        return {"configured": self.configured, "size": self.size}

    def load_state_dict(self, state: dict) -> None:
        if state["configured"] == self.configured:
            self.size = state["size"]


def run_in_parts(function, *tensors, size: int):
    """`function` of parts of `tensors` of `size` rows, joined along the first dimension; no gradient is taken.

    When the memory runs out, the part is done again in halves, and so are those after it. Raises `ValueError` at one row.
    """
    size = min(size, len(tensors[0]))
    results, start = [], 0
    with torch.no_grad():
        while start < len(tensors[0]):
            try:
                results.append(function(*(tensor[start : start + size] for tensor in tensors)))
                start += size
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise ValueError(_advise("one image by itself does not fit", error)) from error
            free_memory()
            size = max(1, size // 2)
    return torch.cat(results)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` is a lack of memory, of the accelerator or the host: some libraries know no error of their own for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    texts = (
        "out of memory",
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def free_memory() -> None:
    """Give back what no tensor holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def average_gradients(parameters) -> None:
    """Replace each gradient by its mean over processes; all processes have gradients of the same parameters.

    They travel in flat buckets of one dtype, at most `BUCKET_BYTES` or one gradient large.
    """
    scale = 1 / torch.distributed.get_world_size()
    for bucket in _buckets(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    ):
        flat = torch.cat([gradient.flatten() for gradient in bucket]).mul_(scale)
        torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(
            bucket, [part.view(gradient.shape) for part, gradient in zip(parts, bucket)]
        )


def _buckets(gradients):
    bucket, size = [], 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def _join(results, batch_size: int):
    if len(results) == 1:
        return results[0][1], results[0][2]
    losses = sum(loss * (count / batch_size) for count, loss, _ in results)
    outputs = {}
    for name, first in results[0][2].items():
        if first.dim():
            outputs[name] = torch.cat([part[name] for _, _, part in results])
        else:
            outputs[name] = sum(part[name] * (count / batch_size) for count, _, part in results)
    return losses, outputs


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


def _advise(what: str, error) -> str:
    return (
        f"out of memory: {what} ({_first_line(error)}). End other programs on the device, turn on gradient checkpointing where the stage "
        "has it, or choose a smaller model or resolution."
    )


def halve_batch(count: int, error: BaseException) -> int:
    """Return half of the `count` images that did not fit; re-raise what is not a lack of memory.

    Raises `ValueError` if not even one image fits.
    """
    if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
        raise error
    if count == 1:
        raise ValueError(
            f"out of memory: not even one image fits ({_first_line(error)}). End other programs on "
            "the device, or lower --precision."
        ) from error
    error.__traceback__ = None  # it holds the tensors that did not fit
    free_memory()
    return count // 2
