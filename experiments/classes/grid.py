"""Draw images of each class of a model beside held-out tiles: `python grid.py RUN PICTURE`."""

import sys

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from em_data import DataConfig, load_data, to_uint8
from em_data.files import write_atomically
from em_data.images import encode_png
from em_generation.loading import read_model
from em_training import config_from_dict, make_image_rng

SHOWN = 8  # images of a class


def draw_grid(run, path):
    """Draw a row of generated images of each class, and below it one of held-out tiles."""
    model = read_model(str(run))
    tiles = config_from_dict(DataConfig, model.config["tiles"])
    data = load_data(model.config["data"], tiles, log=lambda line: None)
    pipe = model.load()
    pipe.set_progress_bar_config(disable=True)
    rows, titles = [], []
    all_views = np.arange(data.held_out.num_views)
    classes = data.held_out.class_labels(all_views)
    for name, number in pipe.labels.items():
        rngs = [make_image_rng(0, i) for i in range(SHOWN)]
        images = pipe(batch_size=SHOWN, generator=rngs, class_labels=name, output_type="pt").images
        rows.append(images)
        views = all_views[np.asarray(classes == number)]
        spaced = np.linspace(0, len(views) - 1, SHOWN).astype(int)
        rows.append(torch.as_tensor(data.held_out.batch(views[spaced])) / 2 + 0.5)
        titles += [f"{name}, generated", f"{name}, held out"]
    enlarged = [row.repeat_interleave(2, -1).repeat_interleave(2, -2) for row in rows]
    side, gap, head = enlarged[0].shape[-1], 4, 24
    page = PIL.Image.new("L", (SHOWN * (side + gap) - gap, len(rows) * (side + head)), 255)
    pen, font = PIL.ImageDraw.Draw(page), PIL.ImageFont.load_default(size=16)
    for i, (row, title) in enumerate(zip(enlarged, titles, strict=True)):
        pen.text((2, i * (side + head) + 2), title, fill=0, font=font)
        for j, levels in enumerate(to_uint8(row * 2 - 1)[:, 0]):
            page.paste(PIL.Image.fromarray(levels), (j * (side + gap), i * (side + head) + head))
    write_atomically(path, encode_png(np.asarray(page)))


if __name__ == "__main__":
    draw_grid(*sys.argv[1:])
