"""Do the defects that a mask-conditioned model draws lie where its masks say?

A segmenter that was trained on labelled real tiles searches the images that each model draws for
layouts of its own, at each scale of guidance by the mask. Recall is the share of defects of the
layouts that it finds, precision the share of found ones that are in the layouts. Real held-out
tiles show how good the segmenter is, the same tiles through the model's autoencoder and grain what
this lets through, and drawn images with the layouts of other images what chance finds.

    python experiments/labelled_pairs/masks.py RUN... [--scales 1 2] [--out FOLDER]
"""

import argparse
import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from em_data import DataConfig, to_uint8
from em_diffusion.drawing import reconstruct
from em_diffusion.mask_family import FAMILY
from em_diffusion.masks import load_pipeline
from em_evaluation.adherence import describe_adherence
from em_evaluation.detector.adherence_measure import describe_set, search_images
from em_evaluation.detector.arms import ALL, Arm, Task
from em_evaluation.detector.gain_trainings import TrainingSettings, read_materials, train_task
from em_evaluation.detector.labelled import LabelledImage
from em_evaluation.detector.outlines import draw_kinds, join
from em_evaluation.detector.segmenter import SegmenterConfig
from em_evaluation.interval import to_json
from em_training.config import read_json_object

KINDS = ("loop=loop_111+loop_100", "dot", "line")
COLOURS = {"loop": "#4cc9f0", "dot": "#80ed99", "line": "#ff5d8f"}
BATCH = 32


def train_reference():
    """Train the segmenter on labelled real tiles; return it and the real held-out tiles."""
    tiles = DataConfig(
        resolution=64, num_synthetic=60, split="specimen", held_out_fraction=0.2, seed=1
    )
    settings = TrainingSettings("synthetic", tiles, KINDS, SegmenterConfig(num_steps=1200), 1.0)
    materials = read_materials(settings)
    task = Task(Arm(ALL), len(materials.micrographs), 0, 0)
    return train_task(task, None, materials), materials.test


def draw_labelled(run: Path, scale: float, num_images: int) -> list[LabelledImage]:
    """Draw images of a run and return them with their layouts."""
    pipeline = load_pipeline(run / "pipeline")
    options = FAMILY.options(mask_scale=scale)
    drawer = FAMILY.start(pipeline, options, seed=0, batch_size=BATCH)
    labelled = []
    for start in range(0, num_images, BATCH):
        numbers = [*range(start, min(start + BATCH, num_images))]
        images, layouts = drawer.draw_layouts(numbers)
        for number, image, layout in zip(numbers, images, layouts):
            for defect in layout:
                defect.kind = "loop" if defect.kind.startswith("loop") else defect.kind
            name = f"{number:06d}"
            pixels = to_uint8(image[0].numpy())
            labelled.append(LabelledImage(pixels, layout, name, name, name))
    return labelled


def send_through_autoencoder(run: Path, labelled: list[LabelledImage]) -> list[LabelledImage]:
    """Return labelled tiles as the autoencoder and the grain of a run's model leave them."""
    pipeline = load_pipeline(run / "pipeline")
    pixels = torch.from_numpy(np.stack([each.image for each in labelled]))
    images = pixels[:, None].float() / 127.5 - 1
    decoded = reconstruct(pipeline.vqvae, images, pipeline.grain, torch.Generator().manual_seed(0))
    return [
        replace(each, image=to_uint8(image[0].numpy())) for each, image in zip(labelled, decoded)
    ]


def shuffle(labelled: list[LabelledImage]) -> list[LabelledImage]:
    """Return the images with the layouts of the next ones."""
    others = [each.defects for each in labelled[1:] + labelled[:1]]
    return [replace(each, defects=other) for each, other in zip(labelled, others)]


def measure(segmenter, name, labelled) -> dict:
    """Return recall and precision of a set, and print them."""
    _, scores = search_images(segmenter, labelled)
    row = describe_set(name, scores)
    print(*describe_adherence([row])[1:], sep="\n", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 2.0])
    parser.add_argument("--num-images", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("runs/masks"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    segmenter, real = train_reference()
    real = real[:: max(1, len(real) // 256)]
    rows = [measure(segmenter, "real held-out tiles", real)]
    pictures = [draw_kinds(each, COLOURS) for each in real[:8]]
    for run in arguments.runs:
        decoded = send_through_autoencoder(run, real)
        rows.append(measure(segmenter, f"real, autoencoder of {run.name}", decoded))
        for scale in arguments.scales:
            labelled = draw_labelled(run, scale, arguments.num_images)
            row = measure(segmenter, f"{run.name}, mask scale {scale:g}", labelled)
            record = read_json_object(run / "run.json")
            row |= {"mask_scale": scale, "train_seconds": record["train_seconds"]}
            row["num_images_seen"] = record["num_images_seen"]
            rows.append(row)
            pictures += [draw_kinds(each, COLOURS) for each in labelled[:8]]
        rows.append(measure(segmenter, f"{run.name}, layouts of others", shuffle(labelled)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"date": date.today().isoformat(), "sets": rows}
    text = json.dumps(to_json(result), indent=1)
    (arguments.out / "masks.json").write_text(text + "\n")
    PIL.Image.fromarray(join(pictures, 8)).save(arguments.out / "masks.png")
    print(arguments.out / "masks.json")


if __name__ == "__main__":
    main()
