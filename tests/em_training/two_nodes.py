"""What two nodes agree on: run by test_nodes.py on two nodes as `two_nodes.py SHARED OWN`."""

import sys
from pathlib import Path

import torch

from em_stylegan.presets import test as preset
from em_training import (
    ask_main_process,
    check_same_config,
    check_same_tiles,
    create_accelerator,
    fail_together,
    fill_cache,
    leave_processes,
    lock_run,
    nodes,
)
from em_training.nodes import OtherProcessError, share_tensors
from support.toy_loop import train

torch.set_num_threads(1)
nodes.SECONDS_TO_SEE = 0.5
shared, own = map(Path, sys.argv[1:])
accelerator = create_accelerator(shared, "no")
rank = accelerator.process_index
assert accelerator.num_processes == 2
assert accelerator.is_local_main_process  # each is alone on its node


def find_error(work):
    """Return the error that `work` ends with, and ask whether it ends so everywhere."""
    try:
        work()
    except ValueError as error:
        return error
    raise AssertionError("no error")


def fail(failing):
    with fail_together(accelerator):
        if rank in failing:
            raise ValueError(f"no {rank}")


# the first that failed says why, the other one is silent
for failing in ((0,), (1,), (0, 1)):
    error, first = find_error(lambda failing=failing: fail(failing)), failing[0]
    assert isinstance(error, OtherProcessError) == (rank != first), error
    assert rank != first or str(error).endswith(f"no {first}")
    assert rank != first or first == 0 or str(error).startswith("process 1 on ")

# each node fills its own cache, after the main process has filled the common one
order = shared / "order"


def work():
    with order.open("a") as file:
        file.write(f"{rank}\n")
    return order.read_text().split()


assert fill_cache(accelerator, work) == ["0", "1"][: rank + 1]
assert ask_main_process(accelerator, lambda: rank) == 0

# the same folder, another one
with lock_run(shared / "run", accelerator):
    assert len(list((shared / "run").iterdir())) == 1  # the lock
error = find_error(lambda: lock_run(own / "run", accelerator).__enter__())
assert isinstance(error, OtherProcessError) == (rank == 1)
if rank == 0:
    assert "The nodes do not share the run folder" in str(error)
    assert "process 1 on" in str(error)
    assert "--out" in str(error)

# the same flags, others
config = preset()
check_same_config(config, accelerator)
other = type(config)(**{**vars(config), "seed": rank, "out": str(own)})
error = find_error(lambda: check_same_config(other, accelerator))
assert rank == 0 or "seed is 1, but 0 in the main process" in str(error), error

# the same tiles, others
check_same_tiles({"fingerprint": "a"}, accelerator)
error = find_error(lambda: check_same_tiles({"fingerprint": str(rank)}, accelerator))
assert rank == 1 or "do not have the same tiles" in str(error)

# weights that another processor has drawn
torch.manual_seed(rank)
model = torch.nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
share_tensors({"model": model}, accelerator)
first, second = accelerator.gather(model.weight.detach().contiguous()[None])
assert torch.equal(first, second)
assert model.weight.is_contiguous(memory_format=torch.channels_last)


# a checkpoint that the main process cannot write ends both
def stop(num_images_seen):
    if num_images_seen == 12 and rank == 0:
        folder = shared / "toy" / "checkpoints"
        folder.write_text("in the way")


error = None
try:
    train(shared, 64, before_step=stop)
except (ValueError, OSError) as raised:
    error = raised
assert isinstance(error, OtherProcessError) == (rank == 1), error
assert rank == 1 or "cannot be written" in str(error)
accelerator.print("from the main process")
print(f"node {rank} is done")
leave_processes()
