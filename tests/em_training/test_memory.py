import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from em_data.batch import Batch
from em_training import MicroBatching, create_accelerator, is_out_of_memory, run_in_parts
from em_training.optimizer import _buckets
from support.commands import TORCHRUN

ROOT = Path(__file__).parents[2]


class Memory:
    """A loss that fits `room` images at once, and what it was asked."""

    def __init__(self, model, room=10**9, error=torch.OutOfMemoryError):
        self.model, self.room, self.error, self.sizes = model, room, error, []

    def __call__(self, part, share):
        self.sizes.append(len(part))
        if len(part) > self.room:
            raise self.error(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                "8.00 GiB"
            )
        losses = (self.model(part.images) - part.noise).square().mean(dim=1)
        (losses.mean() * share).backward()
        return {"mean": losses.mean(), "losses": losses}


@pytest.fixture
def run(tmp_path):
    lines = []
    say = lambda text, from_any_process=False: lines.append(text)  # noqa: E731
    return SimpleNamespace(
        stage="toy", say=say, lines=lines, accelerator=create_accelerator(tmp_path, "no")
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5)
    ).double()


def draw(count=8):
    generator = torch.Generator().manual_seed(1)
    images, noise = torch.randn(2, count, 5, generator=generator, dtype=torch.float64)
    return Batch(images, ids=torch.arange(count), noise=noise)


def take_gradients(model):
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return gradients


def take_whole(model):
    batch = draw()
    losses = (model(batch.images) - batch.noise).square().mean(dim=1)
    losses.mean().backward()
    return losses.detach(), take_gradients(model)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 8, 100])
def test_parts_have_the_gradients_of_the_whole(model, run, size):
    """Also with a last part smaller than the others; loss and outputs are those of the whole
    batch.
    """
    losses, gradients = take_whole(model)
    micro_batching = MicroBatching(size, run=run, flag="--micro-batch-size")
    compute = Memory(model)
    outputs = micro_batching.accumulate(compute, draw(), model.parameters())
    torch.testing.assert_close(take_gradients(model), gradients, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(outputs["mean"], losses.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(outputs["losses"], losses, rtol=1e-12, atol=0)
    assert not outputs["losses"].requires_grad
    assert compute.sizes == {0: [8], 1: [1] * 8, 3: [3, 3, 2], 4: [4, 4], 8: [8], 100: [8]}[size]
    assert not run.lines


def test_out_of_memory_halves_goes_on_and_is_said_once(model, run):
    _, gradients = take_whole(model)
    micro_batching = MicroBatching(0, run=run, flag="--denoiser.micro-batch-size")
    compute = Memory(model, room=3)
    for _ in range(2):
        micro_batching.accumulate(compute, draw(), model.parameters())
        torch.testing.assert_close(take_gradients(model), gradients, rtol=1e-12, atol=1e-15)
    assert compute.sizes == [8, 4] + [2] * 8  # the second step begins with what fitted
    assert len(run.lines) == 1
    assert "--denoiser.micro-batch-size 2 makes it permanent" in run.lines[0]
    assert "Tried" not in run.lines[0]


def test_a_part_that_fails_late_leaves_nothing_behind(model, run):
    """The gradients of the parts before it are dropped, and random numbers are drawn again as they
    were.
    """
    batch = draw()
    calls = []

    def backward(part, share):
        calls.append(torch.rand(len(part), dtype=torch.float64))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out")
        losses = (model(part.images) - part.noise).square().mean(dim=1).mul(1 + calls[-1])
        (losses.mean() * share).backward()

    torch.manual_seed(3)
    MicroBatching(4, run=run, flag="").accumulate(backward, batch, model.parameters())
    gradients = take_gradients(model)
    torch.manual_seed(3)
    factors = 1 + torch.cat([torch.rand(2, dtype=torch.float64) for _ in range(4)])
    (model(batch.images) - batch.noise).square().mean(dim=1).mul(factors).mean().backward()
    torch.testing.assert_close(gradients, take_gradients(model), rtol=1e-12, atol=1e-15)


def test_one_image_too_large_is_an_error_with_a_way_out(model, run):
    micro_batching = MicroBatching(0, run=run, flag="")
    with pytest.raises(
        ValueError, match=r"one image by itself does not fit.*gradient checkpointing"
    ):
        micro_batching.accumulate(Memory(model, room=0), draw(), model.parameters())


def test_other_errors_pass(model, run):
    class Other(RuntimeError):
        def __init__(self, text):
            super().__init__("shapes differ")

    with pytest.raises(Other):
        MicroBatching(0, run=run, flag="").accumulate(
            Memory(model, 3, Other), draw(), model.parameters()
        )
    assert is_out_of_memory(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    )
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_resumed_run_keeps_the_size_unless_told_otherwise(model, run):
    micro_batching = MicroBatching(0, run=run, flag="")
    micro_batching.accumulate(Memory(model, room=3), draw(), model.parameters())
    for configured, size in ((0, 2), (8, 8)):
        resumed = MicroBatching(configured, run=run, flag="")
        resumed.load_state_dict(micro_batching.state_dict())
        assert resumed.size == size


def test_inference_in_parts_halves_too():
    sizes = []

    def function(images, labels):
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("out")
        return images + labels

    images, noise = draw(9).images, draw(9).noise
    assert torch.equal(run_in_parts(function, images, noise, size=8), images + noise)
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    with pytest.raises(ValueError, match="one image by itself"):
        run_in_parts(lambda x: function(torch.cat([x] * 4), 0), images, size=1)


def test_buckets_hold_everything_once_and_one_dtype_each(monkeypatch):
    monkeypatch.setattr("em_training.optimizer.BUCKET_BYTES", 100)
    gradients = [
        torch.zeros(n, dtype=d)
        for n, d in ((10, torch.float32), (15, torch.float32), (99, torch.float32))
    ]
    gradients += [torch.zeros(3), torch.zeros(3, dtype=torch.float64)]
    buckets = list(_buckets(gradients))
    assert [[len(g) for g in bucket] for bucket in buckets] == [[10, 15], [99], [3], [3]]
    assert list(_buckets([])) == []


PROGRAM = """
import sys, torch
from types import SimpleNamespace
from em_data.batch import Batch
from em_training import MicroBatching, average_gradients, create_accelerator, leave_processes
accelerator = create_accelerator(sys.argv[1], "no")
rank = accelerator.process_index
torch.manual_seed(0)
model = torch.nn.Linear(5, 5).double().to(memory_format=torch.channels_last)
generator = torch.Generator().manual_seed(1)
images, noise = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(2))
(model(images) - noise).square().mean().backward()
whole = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
say = lambda text, from_any_process=False: print(f"rank {rank}: {text}")
run = SimpleNamespace(stage="toy", say=say, accelerator=accelerator)
micro_batching = MicroBatching(0, run=run, flag="--flag")
def backward(part, share):
    if rank == 1 and len(part) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    ((model(part.images) - part.noise).square().mean() * share).backward()
batch = list(Batch(images, torch.arange(8), noise=noise).split(4))[rank]
for _ in range(3):
    micro_batching.accumulate(backward, batch, model.parameters())
    average_gradients(model.parameters())
    torch.testing.assert_close([p.grad for p in model.parameters()], whole, rtol=1e-12, atol=1e-15)
    model.zero_grad()
assert micro_batching.size == (1 if rank else 0)
print(f"rank {rank} done")
leave_processes()
"""


def test_a_process_that_halves_alone_does_not_hang_the_other(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*TORCHRUN, str(tmp_path / "program.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("makes it permanent") == 1
    assert "rank 0 done" in done.stdout
    assert "rank 1 done" in done.stdout
