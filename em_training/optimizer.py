"""One optimiser step: gradients averaged over processes, clipped, applied and dropped."""

from collections.abc import Iterable

import accelerate
import torch

BUCKET_BYTES = 25 * 2**20  # of gradients that travel between processes in one piece


def step_optimizer(
    accelerator: accelerate.Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    max_grad_norm: float | None = None,
) -> dict:
    """Average the gradients over processes, clip them to `max_grad_norm`, step and drop them.

    In fp16 the gradients are unscaled first, and a step whose gradients overflow is skipped and
    halves the scale.

    Returns:
        What to log: "gradient_norm" before clipping, and in fp16 "skipped_steps" (the norm of a
        skipped step is logged as 0). In other precisions a norm that is not finite ends the run.
    """
    parameters = list(parameters)
    if accelerator.num_processes > 1:
        average_gradients(parameters)
    scaler = accelerator.scaler
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # asking a GPU whether to clip would wait for it
    if max_grad_norm is not None and (
        norm.device.type != "cpu" or not norm + 1e-6 <= max_grad_norm
    ):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    if scaler is None:
        optimizer.step()
        optimizer.zero_grad()
        return {"gradient_norm": norm}
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    is_finite = torch.isfinite(norm)
    return {
        "gradient_norm": torch.where(is_finite, norm, 0.0),
        "skipped_steps": 1.0 - is_finite.float(),
    }


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes, which all have the same gradients.

    They travel in flat buckets of one dtype, at most `BUCKET_BYTES` or one gradient large. The
    hooks of DistributedDataParallel would not survive double backward, or a process that repeats
    its backward pass.
    """
    scale = 1 / torch.distributed.get_world_size()
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket]).mul_(scale)
        torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(
            bucket, [part.view(gradient.shape) for part, gradient in zip(parts, bucket)]
        )


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Lay out each moment as its parameter: checkpoints hold contiguous tensors.

    The fused optimizer walks the memory of parameter and moments side by side.
    """
    for parameter, state in optimizer.state.items():
        for name, moment in state.items():
            if torch.is_tensor(moment) and moment.shape == parameter.shape and moment.dim() == 4:
                state[name] = torch.empty_like(parameter).copy_(moment)


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
