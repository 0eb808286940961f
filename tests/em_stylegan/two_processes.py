"""Train a few steps in two processes and compare them: run by test_train.py as `torchrun
two_processes.py OUT`.
"""

import sys
from dataclasses import replace

import torch

from em_data import load_data
from em_stylegan import gan_loop
from em_stylegan.gan_loop import train_stylegan
from em_stylegan.networks import create_networks
from em_stylegan.presets import test as preset
from em_training import create_accelerator, leave_processes, list_checkpoints, step_optimizer

torch.set_num_threads(1)
out = sys.argv[1]
config = preset()
config = replace(config, out=out, tiles=replace(config.tiles, cache_dir=f"{out}/cache"))
accelerator = create_accelerator(out, "no")
assert accelerator.num_processes == 2
rank = accelerator.process_index

# the reduced gradient is the gradient of the mean loss: rank r pulls the bias to r, together they
# pull it to 1/2
model = torch.nn.Linear(1, 1)
torch.nn.init.zeros_(model.bias)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
accelerator.backward((model.bias - rank).square().sum() / 2)
step_optimizer(accelerator, optimizer, [model.bias])
assert model.bias.item() == 0.5

with accelerator.main_process_first():
    data = load_data(config.data, config.tiles, log=accelerator.print)
models, averages, create_ema = [], [], gan_loop.EMA


def keep(model, *options):
    models.append(model)
    averages.append(create_ema(model, *options))
    return averages[-1]


gan_loop.EMA = keep
path, seconds = train_stylegan(config, data.train, accelerator=accelerator, out_dir=out)
assert (path / "config.json").is_file()
assert seconds > 0
generator = averages.pop().model
weights = torch.cat([value.flatten() for value in generator.state_dict().values()])
first, second = accelerator.gather(weights[None])
assert torch.equal(first, second), "the processes have grown apart"
untrained = torch.cat(
    [value.flatten() for value in create_networks(config)[0].state_dict().values()]
)
assert torch.isfinite(weights).all()
assert not torch.equal(weights, untrained)

# StyleGAN3's running magnitudes, and the means of w of each class, are those of all images: equal
# in both processes, in the model that trains as in its average
config = replace(
    config,
    conditional=True,
    generator=replace(config.generator, architecture="stylegan3-t", magnitude_half_life_images=50),
    training=replace(
        config.training, num_images=24, path_length_weight=0.0, class_ramp_images=(8, 16)
    ),
)
with accelerator.main_process_first():
    tiles = replace(config.tiles, num_synthetic=6)
    data = load_data("synthetic-materials", tiles, log=accelerator.print)
models.clear()
train_stylegan(config, data.train, accelerator=accelerator, out_dir=f"{out}/alias-free")
for network in (averages[-1].model, *models):
    state = network.state_dict()
    for name, value in state.items():
        first, second = accelerator.gather(value.contiguous()[None])
        assert torch.equal(first, second), f"{name} has grown apart"
    magnitudes = [value.item() for name, value in state.items() if name.endswith("magnitude")]
    assert magnitudes
    assert all(magnitude != 1 for magnitude in magnitudes)
    assert state["mapping_network.class_w_means"].abs().amax(dim=1).min() > 0
accelerator.print("agreed at", list_checkpoints(f"{out}/stylegan/checkpoints")[-1].name.lstrip("0"))
leave_processes()
