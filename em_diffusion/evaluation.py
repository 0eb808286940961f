"""Distance to held-out tiles while the denoiser trains, and the weights that came nearest."""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import broadcast

from em_data.intensity import to_uint8
from em_evaluation import compute_features, frechet_distance, get_extractor
from em_evaluation.images import ImageSet, read_images
from em_training import seed_for


class HeldOutDistance:
    """Frechet distance of generated images to views of `held_out` tiles by efficientnet-lite0, as `evaluate.py` measures it.

    Both sides have `num_images`, or as many as there are held-out views, and go through 8 bits. The smaller they are, the larger the
    distance of the same model: it tells two moments of one run apart and is not the number of a report. Several processes share the
    images; what is measured does not depend on how many they are.
    """

    def __init__(self, held_out, num_images: int, seed: int, *, accelerator, say=print):
        self.accelerator = accelerator
        self.num_images = min(num_images, held_out.num_views)
        if self.num_images < 2:
            raise ValueError(
                f"{held_out.num_views} held-out views are too few for a distance; turn evaluate_every off or hold out more micrographs."
            )
        if self.num_images < num_images:
            say(f"the distance during training is over {self.num_images} images, as many as there are held-out views")
        self.extractor = get_extractor(resolution=held_out.resolution, device=accelerator.device)
        self.reference = None
        if accelerator.is_main_process:
            images = read_images(held_out, self.num_images, seed_for(seed, "held-out distance") % 2**32)
            self.reference = compute_features(images, self.extractor, use_cache=False)

    def measure(self, generate) -> float:
        """The distance of the images that `generate` makes of numbers 0, 1, ...: numbers -> float32 [N, 1, H, W] in [-1, 1]."""
        accelerator = self.accelerator
        share = -(-self.num_images // accelerator.num_processes)
        numbers = range(self.num_images)[accelerator.process_index * share :][:share]
        features = torch.zeros(share, self.extractor.num_features)
        if numbers:
            images = ImageSet(to_uint8(generate(numbers)))
            features[: len(numbers)] = torch.from_numpy(compute_features(images, self.extractor, use_cache=False))
        features = accelerator.gather(features.to(accelerator.device))[
            : self.num_images
        ]  # what fills up the last share is cut off
        distance = torch.zeros(1, device=accelerator.device)
        if accelerator.is_main_process:
            distance += frechet_distance(features.cpu().numpy(), self.reference)
        return float(broadcast(distance))


class BestWeights:
    """Measures the averaged weights now and then and keeps those that came nearest, in `run.dir`/best.

    What is kept is on disk alone: a run that was killed replays the steps since its checkpoint, comes to the same distances and to the
    same best, which lies there already.
    """

    def __init__(self, held_out, config, run):
        self.num_steps, self.run = config.num_evaluation_steps, run
        self.distance = HeldOutDistance(
            held_out, config.num_evaluation_images, config.seed, accelerator=run.accelerator, say=run.say
        )
        self.record = read_best(run.dir) if run.accelerator.is_main_process else None

    def update(self, model, generate, num_images_seen: int) -> float:
        """Return the distance of `generate`'s images, and keep `model` when it is the smallest so far; all processes call it."""
        value = self.distance.measure(generate)
        if self.run.accelerator.is_main_process and (self.record is None or value < self.record["frechet_distance"]):
            self.record = {
                "num_images_seen": num_images_seen,
                "frechet_distance": value,
                "num_images": self.distance.num_images,
                "num_inference_steps": self.num_steps,
            }
            save_best(model, self.run.dir, self.record)
        return value


def save_best(model, folder, record: dict):
    """Keep `model` as `folder`/best/unet and `record` beside it as best.json, in place of what was there.

    A kill in between leaves the old one, the new one, or what `read_best` makes one of them.
    """
    folder = Path(folder)
    new, old, best = folder / ".best-new", folder / ".best-old", folder / "best"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(new / "unet")
    (new / "best.json").write_text(json.dumps(record, indent=2) + "\n")  # last: with it, the folder is whole
    if best.exists():
        os.replace(best, old)
    os.replace(new, best)
    shutil.rmtree(old, ignore_errors=True)


def read_best(folder) -> dict | None:
    """The record of the weights kept in `folder`/best, or None; finishes what a kill left half done."""
    folder = Path(folder)
    best = folder / "best"
    for name in (".best-new", ".best-old"):
        if not best.exists() and _read_record(folder / name) is not None:
            os.replace(folder / name, best)
    return _read_record(best)


def _read_record(folder) -> dict | None:
    try:
        return json.loads((folder / "best.json").read_text())
    except (OSError, ValueError):  # absent, or cut short by a kill
        return None
