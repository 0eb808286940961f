"""How the split, the reference and the number of images change the Frechet distance.

    python experiments/2024_gan_vs_ldm/leakage.py --scale small
    python experiments/2024_gan_vs_ldm/leakage.py --scale study --data damaged-alloys:FOLDER \\
        --images LDM=FOLDER

The study drew its held-out views at random from all views (a leaky split), compared with training
images, and scored 50,000 images. It does not report what each of these changes. Two generators
stand in for a model: one copies training tiles (turned, shifted by up to 4 pixels, with slight
noise); the other, on the embedded data, draws new micrographs of the same kind. Use --images to add
images of real models.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from em_data import DataConfig, load_data, read_image_folder
from em_data.cutting import find_tile_positions
from em_data.files import write_atomically
from em_data.synthetic_micrographs import synthesise_micrographs
from em_data.views import ELEMENTS, SYMMETRIES, apply_symmetry
from em_evaluation import compute_features, frechet_distance_interval, get_extractor
from em_evaluation.environment import describe_environment
from em_evaluation.images import ImageSet, read_images

RESULTS = Path(__file__).parent / "results"
SPLITS = ("micrograph", "leaky")
REFERENCES = ("held_out", "train")
FRESH_SEED = 5  # of the honest generator's micrographs; the data have seed 0


@dataclass(frozen=True)
class Scale:
    """Side of the tiles, source and number of the micrographs, numbers of images to score."""

    resolution: int
    data: str
    num_micrographs: int | None
    nums_images: tuple[int, ...]


SCALES = {
    "small": Scale(64, "synthetic", 24, (50, 100, 200)),
    "study": Scale(256, "damaged-alloys:", None, (500, 1000, 2000, 5000, 10_000)),
}


def learn_by_heart(train: ImageSet, seed=0, shift_px=4, noise=4.0) -> ImageSet:
    """Return copies of training tiles: turned, shifted by up to `shift_px`, with slight noise."""
    rng = np.random.default_rng([seed, 1])
    copies = []
    for tile in train.levels[:, 0]:
        moved = ndimage.shift(
            tile.astype(np.float32),
            rng.integers(-shift_px, shift_px + 1, 2),
            order=0,
            mode="reflect",
        )
        copies.append(
            apply_symmetry(moved, list(ELEMENTS)[rng.integers(8)])
            + rng.normal(0, noise, tile.shape)
        )
    return ImageSet(np.stack(copies).round().clip(0, 255).astype(np.uint8)[:, None], train.groups)


def draw_new(num, resolution, micrograph_px=512) -> ImageSet:
    """Return views of tiles of embedded micrographs that no split contains."""
    corners = find_tile_positions((micrograph_px, micrograph_px), resolution)
    per_micrograph = max(1, len(corners) // 4)
    rng, tiles, groups = np.random.default_rng(FRESH_SEED), [], []
    for number, micrograph in enumerate(
        synthesise_micrographs(-(-num // per_micrograph), FRESH_SEED, micrograph_px)
    ):
        for corner in rng.permutation(len(corners))[:per_micrograph]:
            y, x = corners[corner]
            view = SYMMETRIES["paper"][rng.integers(len(SYMMETRIES["paper"]))]
            tiles.append(
                apply_symmetry(micrograph.image[y : y + resolution, x : x + resolution], view)
            )
            groups.append(number)
    return ImageSet(np.stack(tiles)[:num, None], np.array(groups)[:num])


def measure(
    source, config, nums_images, extractor, images=None, seed=0, log=print, **feature_options
):
    """Return the rows of the experiment.

    Each is a split, reference, generator and number of images, and the distance with its interval.
    """
    rows, largest = [], max(nums_images)
    honest = (
        draw_new(largest, config.resolution, config.micrograph_size)
        if source == "synthetic"
        else None
    )
    for split in SPLITS:
        data = load_data(source, DataConfig(**{**vars(config), "split": split}), log=log)
        most = min([largest, len(data.held_out), len(data.train)])
        sides = {
            "held_out": read_images(data.held_out, most, seed),
            "train": read_images(data.train, most, seed + 1),
        }
        generators = {
            "learnt by heart": learn_by_heart(read_images(data.train, most, seed + 2), seed)
        }
        if honest is not None:
            generators["honest"] = honest
        generators |= {
            name: read_images(each, min(most, len(each))) for name, each in (images or {}).items()
        }
        sets = sides | generators
        features = {}
        for name, each in sets.items():
            log(f"{split}: features of {name}, {len(each):,} images")
            features[name] = compute_features(each, extractor, **feature_options)
        for reference in REFERENCES:
            for name in generators:
                for num in sorted({min(num, most, len(sets[name])) for num in nums_images}):
                    interval = frechet_distance_interval(
                        features[name][:num],
                        features[reference][:num],
                        groups_a=cut(sets[name].groups, num),
                        groups_b=cut(sets[reference].groups, num),
                        seed=seed,
                    )
                    row = {"split": split, "reference": reference, "generator": name}
                    row |= {"num_images": num, "frechet_distance": interval.to_json()}
                    rows.append(row)
    return rows


def cut(groups, num):
    return None if groups is None else groups[:num]


def summarise(rows) -> list[dict]:
    """Return each generator's distance by the honest protocol, and what each habit adds to it."""
    summary = []
    for name in dict.fromkeys(row["generator"] for row in rows):
        mine = [row for row in rows if row["generator"] == name]
        nums = sorted(
            set.intersection(
                *({row["num_images"] for row in mine if row["split"] == split} for split in SPLITS)
            )
        )

        def find(split, reference, num, key="value", mine=mine):
            return next(
                row["frechet_distance"][key]
                for row in mine
                if (row["split"], row["reference"], row["num_images"]) == (split, reference, num)
            )

        ours, low, high = (
            find("micrograph", "held_out", nums[-1], key) for key in ("value", "low", "high")
        )
        summary.append(
            {
                "generator": name,
                "num_images": nums[-1],
                "honest_protocol": ours,
                "half_interval": (high - low) / 2,
                "leaky_split_adds": find("leaky", "held_out", nums[-1]) - ours,
                "training_reference_adds": find("micrograph", "train", nums[-1]) - ours,
                "both_add": find("leaky", "train", nums[-1]) - ours,
                "fewer_images": nums[0],
                "fewer_images_add": find("micrograph", "held_out", nums[0]) - ours,
            }
        )
    return summary


def conclude(summary) -> list[str]:
    """Return which habits change the distance by more than its interval's half width."""
    habits = {
        "leaky_split_adds": "the leaky split",
        "training_reference_adds": "the training reference",
        "both_add": "both together",
        "fewer_images_add": "fewer images",
    }
    sentences = []
    for row in summary:
        moved = [habit for key, habit in habits.items() if abs(row[key]) > row["half_interval"]]
        still = [habit for habit in habits.values() if habit not in moved]
        sentences.append(
            f"{row['generator']}, half width of the 95 % interval {row['half_interval']:.2f}: "
            f"moved beyond it by {', '.join(moved) or 'nothing'}; "
            f"not by {', '.join(still) or 'nothing'}."
        )
    scores = {row["generator"]: row["honest_protocol"] for row in summary}
    if {"honest", "learnt by heart"} <= set(scores):
        better = "no worse than" if scores["learnt by heart"] <= scores["honest"] else "worse than"
        sentences.append(
            "By the honest protocol the generator that has learnt by heart scores "
            f"{better} the honest one ({scores['learnt by heart']:.2f} against "
            f"{scores['honest']:.2f}): the distance is "
            f"{'no' if better == 'no worse than' else 'not by itself a'} guard against copies; "
            "the report's memorisation section is."
        )
    return sentences


def write_tables(result) -> str:
    """Return the result as Markdown."""
    lines = [
        f"# Leakage, scale {result['scale']}",
        "",
        f"{result['data']}, tiles of {result['resolution']} pixels; "
        f"{result['extractor'].split(',')[0]} features. "
        f"`leakage_{result['scale']}.json` has every number; the study has none for this.",
        "",
        "What each habit alone adds to the distance by the honest protocol (split by micrograph, "
        "held-out reference):",
        "",
        "| generator | images | honest protocol | leaky split | training reference | "
        "both, as the study | fewer images |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        adds = [row[key] for key in ("leaky_split_adds", "training_reference_adds", "both_add")]
        cells = [
            row["generator"],
            f"{row['num_images']:,}",
            f"{row['honest_protocol']:.2f}",
            *(f"{add:+.2f}" for add in adds),
        ]
        lines.append(
            "| "
            + " | ".join([*cells, f"{row['fewer_images_add']:+.2f} at {row['fewer_images']}"])
            + " |"
        )
    lines += ["", *(f"- {sentence}" for sentence in conclude(result["summary"]))]
    lines += ["", "Every distance with its 95 % interval:", ""]
    lines += [
        "| split | reference | generator | images | Frechet distance |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        metric = row["frechet_distance"]
        interval = f"{metric['value']:.2f} [{metric['low']:.2f}, {metric['high']:.2f}]"
        cells = [row["split"], row["reference"].replace("_", "-"), row["generator"]]
        lines.append(f"| {' | '.join([*cells, format(row['num_images'], ','), interval])} |")
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--data", help="micrographs (default at scale small: embedded)")
    parser.add_argument(
        "--images",
        nargs="*",
        default=[],
        metavar="NAME=FOLDER",
        help="generated images of real models",
    )
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    scale = SCALES[args.scale]
    source = args.data or scale.data
    if source == "damaged-alloys:":
        parser.error(
            "the study's scale needs the study's micrographs: --data damaged-alloys:FOLDER"
        )
    config = DataConfig(
        resolution=scale.resolution, num_micrographs=scale.num_micrographs, held_out_fraction=0.25
    )
    extractor = get_extractor(args.extractor, resolution=scale.resolution)
    images = {
        name: read_image_folder(folder)
        for name, _, folder in (text.partition("=") for text in args.images)
    }
    rows = measure(source, config, scale.nums_images, extractor, images)
    result = {
        "experiment": "leakage",
        "scale": args.scale,
        "data": Path(source.partition(":")[0]).name,
        "resolution": scale.resolution,
        "extractor": extractor.identity,
        "summary": summarise(rows),
        "rows": rows,
        "environment": describe_environment(),
    }
    for suffix, text in (
        (".json", json.dumps(result, indent=1) + "\n"),
        (".md", write_tables(result)),
    ):
        write_atomically(args.out / f"leakage_{args.scale}{suffix}", text.encode())
    print(write_tables(result))


if __name__ == "__main__":
    main()
