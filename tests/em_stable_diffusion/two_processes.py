"""Train in two processes: run by test_train.py as `torchrun two_processes.py CONFIG`."""

import sys
from pathlib import Path

import torch

from em_stable_diffusion import LoRAConfig, train_lora
from em_training import config_from_json, leave_processes

torch.set_num_threads(1)
train_lora(config_from_json(LoRAConfig, Path(sys.argv[1]).read_text()))
leave_processes()
