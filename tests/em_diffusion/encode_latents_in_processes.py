"""Encode 48 views, a process of them killed after so many chunks: run by test_latents.py under
torchrun.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.latents import encode_latents
from em_diffusion.presets import test as preset
from em_training import create_accelerator, latents, leave_processes


class CountedTiles:
    """Random tiles that remember which of them were asked for in batches."""

    def __init__(self):
        self.images = torch.rand(48, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.num_views, self.fingerprint, self.calls = 48, "counted", []

    def __len__(self):
        return self.num_views

    def batch(self, view_ids):
        self.calls.append([int(view) for view in view_ids])
        return self.images[torch.as_tensor(view_ids)]


def make_parts():
    """The same autoencoder and tiles in every process."""
    torch.manual_seed(0)
    return create_autoencoder(preset().autoencoder, 16).eval(), CountedTiles()


def main(folder, killed_after):
    torch.set_num_threads(1)
    accelerator = create_accelerator(folder, "no")
    assert accelerator.num_processes == 2
    write, count = latents.write_chunk, 0

    def write_or_die(*arguments):
        nonlocal count
        write(*arguments)
        count += 1
        if accelerator.process_index == 1 and count == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    latents.write_chunk = write_or_die
    model, tiles = make_parts()
    encode_latents(model, tiles, folder / "latents", accelerator=accelerator, batch_size=1)
    seen = [view for views in tiles.calls for view in views]
    assert len(seen) == len(set(seen))
    (folder / f"seen-{accelerator.process_index}.json").write_text(json.dumps(seen))
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
