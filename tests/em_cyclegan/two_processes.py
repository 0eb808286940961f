"""Train a few steps in two processes and compare them with one: run by test_train.py as `torchrun
two_processes.py OUT`.
"""

import sys
from dataclasses import replace

import torch

from em_cyclegan import translation_loop
from em_cyclegan.presets import test as preset
from em_cyclegan.translation_loop import Domains, train_translation
from em_data import load_data
from em_training import create_accelerator, leave_processes, list_checkpoints, load_checkpoint

torch.set_num_threads(1)
out = sys.argv[1]
config = preset()
training = replace(config.training, num_images=32, evaluate_every=32, num_evaluation_images=6)
config = replace(
    config, out=out, training=training, tiles=replace(config.tiles, cache_dir=f"{out}/cache")
)
accelerator = create_accelerator(out, "no")
assert accelerator.num_processes == 2

with accelerator.main_process_first():
    data = [
        load_data(name, config.tiles, log=accelerator.print)
        for name in (config.source, config.data)
    ]
sides = [Domains(*(getattr(each, side) for each in data)) for side in ("train", "held_out")]
made, create_pools = [], translation_loop.create_pools


def keep(config, networks, accelerator):
    made.append((networks, create_pools(config, networks, accelerator)))
    return made[-1][1]


translation_loop.create_pools = keep
path, seconds = train_translation(
    config, sides[0], accelerator=accelerator, out_dir=out, held_out=sides[1]
)
assert (path / "b_to_a" / "config.json").is_file()
((networks, pools),) = made
values = [*networks.generators.parameters(), *networks.discriminators.parameters()]
values += [pool.images for pool in pools.values()]
flat = torch.cat([value.detach().flatten() for value in values])
assert torch.isfinite(flat).all()
assert pools["a"].count == pools["b"].count == training.pool_size
first, second = accelerator.gather(flat[None])
assert torch.equal(first, second), "the processes have grown apart"
if accelerator.is_main_process:
    state = load_checkpoint(list_checkpoints(f"{out}/cyclegan/checkpoints")[-1])["state"]
    torch.save(state["generators"], f"{out}/weights.pt")
accelerator.wait_for_everyone()
leave_processes()
