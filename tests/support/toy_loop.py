"""A whole training of a line, a few milliseconds a step, run by test_run.py in processes of its
own.
"""

import sys
import time
from types import SimpleNamespace

import torch

from em_training import (
    EMA,
    TrainingRun,
    average_gradients,
    create_accelerator,
    make_generator,
)


class Killed(Exception):
    pass


def train(
    out_dir,
    num_images,
    *,
    seconds_per_step=0.0,
    precision="no",
    poison_at=None,
    log_every=8,
    before_step=None,
):
    accelerator = create_accelerator(out_dir, precision)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    ema = EMA(model, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "ema": ema, "optimizer": optimizer}
    sizes = {"log_every": log_every, "sample_every": 16, "checkpoint_every": 16}
    config = SimpleNamespace(num_images=num_images, batch_size=4, **sizes)
    with TrainingRun(out_dir, "toy", config, accelerator) as run:
        num_images_seen = run.resume(state | {"absent": None})
        while num_images_seen < num_images:
            if before_step is not None:
                before_step(num_images_seen)
            generator = make_generator(
                0, rank=accelerator.process_index, num_images_seen=num_images_seen
            )
            inputs = torch.randn(4, 4, generator=generator)
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            if poison_at is not None and num_images_seen >= poison_at:
                loss = loss * float("nan")
            optimizer.zero_grad()
            loss.backward()
            if accelerator.num_processes > 1:
                average_gradients(model.parameters())
            optimizer.step()
            num_images_seen += 4
            ema.update(model, num_images_seen, 4)
            run.log(loss=loss, rank=accelerator.process_index / 3)
            run.step(num_images_seen)
            time.sleep(seconds_per_step)
        run.finish(num_images_seen)
    return {name: part.state_dict() for name, part in state.items()}


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), seconds_per_step=float(sys.argv[3]))
