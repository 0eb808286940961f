"""Train in two processes, which must end with the same weights: run by test_train.py as `torchrun
two_processes.py CONFIG`.
"""

import sys
from pathlib import Path

import torch

from em_stable_diffusion import LoRAConfig, lora_loop, train_lora
from em_training import config_from_json, leave_processes

torch.set_num_threads(1)
models, create_ema = [], lora_loop.EMA


def keep(adapters, *options):
    ema = create_ema(adapters, *options)
    models.extend((adapters, ema.model))
    return ema


lora_loop.EMA = keep
train_lora(config_from_json(LoRAConfig, Path(sys.argv[1]).read_text()))
flat = torch.cat([each.detach().flatten() for model in models for each in model.parameters()])
assert torch.isfinite(flat).all()
first, second = torch.empty_like(flat), torch.empty_like(flat)
torch.distributed.all_gather([first, second], flat)
assert torch.equal(first, second), "the processes have grown apart"
leave_processes()
