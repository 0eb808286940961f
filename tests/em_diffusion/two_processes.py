"""Train a denoiser with classes in one process or two: run by test_evaluation.py as `torchrun
two_processes.py OUT`.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from conftest import FakeTiles

from em_diffusion import PRESETS, denoiser_loop
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.denoiser import create_denoiser, create_scheduler
from em_diffusion.denoiser_loop import generate_images, train_denoiser
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_evaluation.held_out import HeldOutDistance
from em_training import create_accelerator, leave_processes, read_best
from em_training.latents import Latents

torch.set_num_threads(1)
out = Path(sys.argv[1])
accelerator = create_accelerator(out, "no")
config = dataclasses.replace(
    PRESETS["test"]().denoiser,
    evaluate_every=16,
    num_evaluation_images=5,
    num_evaluation_steps=2,
    posthoc_ema_every=32,
    micro_batch_size=3,
)
torch.manual_seed(0)
vqvae = create_autoencoder(PRESETS["test"]().autoencoder, 16).eval()
array = torch.randn(24, 4, 8, 8).half().numpy()
latents = Latents(array, [0.0] * 4, [1.0] * 4, ("a", "b", "c"), torch.arange(24) % 3)
held_out = FakeTiles(num_views=5, seed=1)
models = []
create_ema = denoiser_loop.create_ema
denoiser_loop.create_ema = lambda model, *args: models.append(model) or create_ema(model, *args)
train_denoiser(
    config, latents, latents, vqvae, accelerator=accelerator, out_dir=out, held_out=held_out
)
weights = torch.cat([value.flatten() for value in models[0].state_dict().values()])
assert (accelerator.gather(weights[None]) == weights).all(), "the processes have grown apart"

torch.manual_seed(1)
unet = create_denoiser(config, 8, 4, 3).eval()  # the same weights whatever the number of processes
distance = HeldOutDistance(held_out, 5, 0, accelerator=accelerator)
pipeline = EMLatentDiffusionPipeline(vqvae, unet, create_scheduler(config))
value = distance.measure(
    lambda numbers: generate_images(
        pipeline, 0, numbers, 2, accelerator, class_labels=latents.share_classes(numbers)
    )
)
assert (accelerator.gather(torch.tensor([value], dtype=torch.float64)) == value).all()
if accelerator.is_main_process:
    (out / "measured.json").write_text(
        json.dumps({"distance": value, "best": read_best(out / "denoiser")})
    )
leave_processes()
