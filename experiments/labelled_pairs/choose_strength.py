"""Measure what the strength costs and gains: the distance to real images, and the labels kept.

    python experiments/labelled_pairs/choose_strength.py RUN --out experiments/labelled_pairs

RUN is an LDM that was trained on unlabelled tiles of `synthetic-other`. Pictures go through it at
each strength: simulated ones; layouts like those of ten labelled micrographs, in their looks; and
grounds, on which their defects are pasted afterwards. The distance is to tiles of other micrographs
of `synthetic-other`. A segmenter that was trained on labelled ones says which defects are still
there. Rows are added to those that strength.json has.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from em_data import DataConfig, ImageArray, from_uint, load_data, to_uint8
from em_data.labels.colours import choose_colours
from em_data.labels.outlines import trace_outlines
from em_data.micrograph import Defect
from em_data.synthetic_micrographs import synthesise_micrograph
from em_data.synthetic_other import synthesise_other_micrograph
from em_evaluation import compute_features, frechet_distance_interval, get_extractor
from em_evaluation.detector.adherence_measure import describe_set, search_images
from em_evaluation.detector.gain_trainings import TrainingSettings, read_materials
from em_evaluation.detector.labelled import LabelledImage, get_mask
from em_evaluation.detector.segmenter import SegmenterConfig, train_segmenter
from em_evaluation.interval import to_json
from em_generation.loading import read_model
from em_generation.pairs import PairDrawer, PairOptions
from em_generation.pairs.labelled import read_labelled
from em_generation.pairs.makers import NUM_REFERENCES, CopyPaste, LikeLabelled, Simulated
from em_generation.pairs.preview import draw_outlines

WAYS = ("simulated", "like labelled", "copy-paste")
KINDS = {"loop_111": "loop", "loop_100": "loop", "dot": "dot", "line": "line"}
WORDS = ("loop=loop_100+loop_111", "dot", "line")


def cut(synthesise, seeds):
    """Tiles [N, 1, 64, 64] of micrographs of 512 pixels."""
    images = [synthesise(seed, 512).image for seed in seeds]
    tiles = [
        each[y : y + 64, x : x + 64]
        for each in images
        for y in range(0, 512, 64)
        for x in range(0, 512, 64)
    ]
    return from_uint(np.stack(tiles))[:, None]


def label(images, layouts):
    """Images [N, 1, 64, 64] with their layouts, as the segmenter takes them."""
    return [
        LabelledImage(
            to_uint8(image)[0],
            [Defect(KINDS[d.kind], d.box_px, d.mask) for d in layout],
            str(i),
            str(i),
            str(i),
        )
        for i, (image, layout) in enumerate(zip(images, layouts))
    ]


def measure_dice(comparisons):
    """Dice of the pixels of all found and all true loops."""
    both = found_px = true_px = 0
    for each in comparisons:
        found, true = np.zeros((2, 64, 64), bool)
        for canvas, defects in ((found, each.found), (true, each.true)):
            for defect in (d for d in defects if d.kind == "loop"):
                x0, y0, x1, y1 = defect.box_px
                canvas[y0:y1, x0:x1] |= get_mask(defect)
        both += (found & true).sum()
        found_px, true_px = found_px + found.sum(), true_px + true.sum()
    return 2 * both / (found_px + true_px)


def draw_all(drawer, num):
    """Images [num, 1, 64, 64] on the CPU and their layouts."""
    images, layouts = [], []
    for start in range(0, num, 64):
        numbers = list(range(start, min(start + 64, num)))
        images.append(drawer.draw(numbers))
        layouts += [drawer.take(number).defects for number in numbers]
    return torch.cat(images), layouts


def draw_columns(base, makers, num=6):
    """The columns of `save_picture`: (images, layouts, whether outlines are drawn)."""
    name, maker = makers["simulated"]
    pictures, layouts = zip(*(maker.start(i, (64, 64)) for i in range(num)))
    columns = [(torch.from_numpy(np.stack(pictures))[:, None], layouts, True)]
    shown = [("simulated", strength) for strength in (0, 0.1, 0.2, 0.3, 0.5)]
    for way, strength in [*shown, ("like labelled", 0.2), ("copy-paste", 0.2)]:
        name, maker = makers[way]
        pairs = PairOptions(pairs=name, strength=strength)
        drawn = draw_all(PairDrawer(base, maker, pairs, (64, 64), 0), num)
        columns.append((*drawn, way != "simulated"))
    return columns


def save_picture(path, columns, num=6, scale=3):
    """A column a setting: the start of way 1, its strengths, and the other two ways."""
    rows = []
    for i in range(num):
        cells = []
        for images, layouts, is_outlined in columns:
            size = (64 * scale, 64 * scale)
            cell = PIL.Image.fromarray(to_uint8(images[i])[0]).resize(size, 0).convert("RGB")
            if is_outlined:
                outlines = [
                    (d.kind, o) for d in layouts[i] for o in trace_outlines(d.mask, d.box_px[:2])
                ]
                cell = draw_outlines(cell, outlines, scale, choose_colours(KINDS))
            cells.append(np.pad(np.asarray(cell), ((0, 4), (0, 4), (0, 0)), constant_values=255))
        rows.append(np.hstack(cells))
    PIL.Image.fromarray(np.vstack(rows)).save(path, optimize=True)


def save_chart(path, rows, levels):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for way, style in zip(dict.fromkeys(row["way"] for row in rows), ("o-", "s--", "^:")):
        own = [row for row in rows if row["way"] == way]
        x = [row["strength"] for row in own]
        left.plot(x, [row["distance"]["value"] for row in own], style, label=way, markersize=4)
        for axes, key in ((middle, "recall"), (right, "precision")):
            axes.plot(x, [row["loops"][key]["value"] for row in own], style, markersize=4)
    for axes, values in (
        (left, {"real": levels["real"]["value"], "simulation": levels["simulation"]["value"]}),
        (middle, {"real": levels["recall_on_real"]}),
        (right, {"real": levels["precision_on_real"]}),
    ):
        for name, value in values.items():
            axes.axhline(value, color="grey", linewidth=0.8, linestyle=":")
            axes.text(
                0.99,
                value,
                name,
                ha="right",
                va="bottom",
                color="grey",
                fontsize=8,
                transform=axes.get_yaxis_transform(),
            )
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("strength")
    left.set(ylabel="Frechet distance to real", ylim=(0, None))
    middle.set(ylabel="recall of loops", ylim=(0, 1))
    right.set(ylabel="precision of loops", ylim=(0, 1))
    left.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=160)


def make_makers(base, num_labelled):
    """The three ways: name -> (option, maker)."""
    references = base.draw_references(NUM_REFERENCES)[:, 0].numpy()
    tiles = DataConfig(resolution=256, num_micrographs=num_labelled)
    data = load_data("synthetic-other", tiles, log=lambda line: None)
    labelled = read_labelled(data.train, name="synthetic-other", seed=0, say=print)
    return {
        "simulated": ("simulated", Simulated(references, 1.0, seed=0)),
        "like labelled": ("simulated", LikeLabelled(labelled, seed=0)),
        "copy-paste": ("copy-paste", CopyPaste(labelled, seed=0)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="an LDM, trained on synthetic-other")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--num-labelled", type=int, default=10, help="micrographs")
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8]
    )
    arguments = parser.parse_args()
    num = arguments.num_images

    extractor = get_extractor("efficientnet-lite0")
    look = lambda images: compute_features(ImageArray(images), extractor, use_cache=False)  # noqa: E731
    real = look(cut(synthesise_other_micrograph, range(7_000_000, 7_000_016)))
    levels = {
        name: to_json(frechet_distance_interval(look(cut(synthesise, seeds)[:num]), real))
        for name, synthesise, seeds in (
            ("real", synthesise_other_micrograph, range(8_000_000, 8_000_016, 2)),
            ("simulation", synthesise_micrograph, range(8_000_000, 8_000_016, 2)),
        )
    }
    print(levels, flush=True)

    tiles = DataConfig(resolution=64, split="specimen", held_out_fraction=0.3)
    network = SegmenterConfig(num_steps=1500)
    materials = read_materials(
        TrainingSettings("synthetic-other", tiles, WORDS, network, 1.0), log=lambda line: None
    )
    segmenter = train_segmenter(materials.get_pool_set(), materials.kinds, network, seed=0)
    comparisons, scores = search_images(segmenter, materials.test)
    on_real = describe_set("real", scores)["by_kind"]["loop"]
    levels |= {
        "recall_on_real": on_real["recall"]["value"],
        "precision_on_real": on_real["precision"]["value"],
        "dice_on_real": float(measure_dice(comparisons)),
    }
    print(levels, flush=True)

    model = read_model(arguments.run)
    pipeline = model.load()
    path = arguments.out / "strength.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    options = model.family.options(guidance_scale=1.0)
    base = model.family.start(pipeline, options, seed=0, batch_size=64)
    makers = make_makers(base, arguments.num_labelled)
    for way, (name, maker) in makers.items():
        for strength in arguments.strengths if way in arguments.ways else []:
            pairs = PairOptions(pairs=name, strength=strength)
            images, layouts = draw_all(PairDrawer(base, maker, pairs, (64, 64), 0), num)
            found, scores = search_images(segmenter, label(images, layouts))
            kinds = describe_set("", scores)["by_kind"]
            row = {
                "num_images": num,
                "way": way,
                "strength": strength,
                "distance": to_json(frechet_distance_interval(look(images), real)),
                "dice_of_loops": float(measure_dice(found)),
                "quality": float(scores.quality.mean()),
                **{f"{kind}s": kinds[kind] for kind in ("loop", "dot", "line")},
            }
            rows.append(row)
            print(
                way,
                strength,
                row["distance"]["value"],
                row["dice_of_loops"],
                row["loops"]["recall"]["value"],
                row["loops"]["precision"]["value"],
                flush=True,
            )
            arguments.out.mkdir(parents=True, exist_ok=True)
            content = {"num_labelled": arguments.num_labelled, "levels": levels, "rows": rows}
            path.write_text(json.dumps(content, indent=1) + "\n")
    save_picture(arguments.out / "strength_images.png", draw_columns(base, makers))
    save_chart(arguments.out / "strength.png", rows, levels)


if __name__ == "__main__":
    main()
