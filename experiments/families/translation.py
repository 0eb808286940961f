"""Is a translation nearer to its target than the source is, and do the source's masks still hold?

    python experiments/families/translation.py RUN
    python experiments/families/translation.py RUN --kinds loop=hcloop+loop_100+loop_111

Source and target must be labelled. All images are held-out tiles. Distances are Frechet distances
to held-out tiles of the target. A segmenter that learned from the target's training tiles searches
them for the labelled defects: recall is the share of labelled defects that it finds, precision the
share of found ones that are labelled. Two more segmenters learned from the source's training tiles,
before and after translation: the difference between them is what a translation costs the labels,
also where the target's defects look otherwise.
"""

import argparse
import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from em_cyclegan.config import CycleGANConfig
from em_data import load_data, save_image_grid, to_uint8
from em_data.files import write_atomically
from em_data.sampler import make_permutation
from em_evaluation.detector.adherence_measure import describe_set, search_images
from em_evaluation.detector.labelled_tiles import list_labelled, parse_kinds
from em_evaluation.detector.segmenter import SegmenterConfig, TrainingSet, train_segmenter
from em_evaluation.distances import frechet_distance
from em_evaluation.feature_cache import compute_features
from em_evaluation.features import get_extractor
from em_evaluation.images import ImageSet
from em_generation.loading import read_model
from em_training import config_from_dict

SHOWN = 8


def choose(tiles, num_images, seed):
    """Return the ids of views in a random order: each tile once, or all views of too few tiles."""
    if tiles.num_tiles >= num_images:
        return make_permutation(tiles.num_tiles, seed)[:num_images] * tiles.num_symmetries
    return make_permutation(len(tiles), seed)[:num_images]


def measure_distances(sets, reference):
    """Return {name: Frechet distance to the reference}, images [N, 1, R, R]."""
    extractor = get_extractor("efficientnet-lite0", resolution=reference.shape[-1], device="cpu")
    features = {
        name: compute_features(ImageSet(to_uint8(images)), extractor, use_cache=False)
        for name, images in {**sets, "": reference}.items()
    }
    return {name: float(frechet_distance(features[name], features[""])) for name in sets}


def translate(pipeline, tiles, ids):
    """Return translated tiles, float32 [N, 1, R, R] on the CPU."""
    parts = torch.as_tensor(ids).split(50)
    return torch.cat([pipeline.translate(tiles.batch(part)).cpu() for part in parts])


def put_images(labelled, images):
    """Return labelled images with other pixels."""
    pixels = to_uint8(images)[:, 0]
    return [replace(each, image=image) for each, image in zip(labelled, pixels, strict=True)]


def train_searcher(labelled, kinds, config, seed):
    """Train a segmenter on labelled images."""
    names = sorted(set(kinds.values()))
    return train_segmenter(TrainingSet.from_images(labelled, names), names, config, seed=seed)


def join_loops(source, target) -> list[str]:
    """Return the kinds that both sides have, as words of --kinds, with all loops as one."""
    known = [each for each in target.kinds if each in source.kinds]
    loops = [each for each in known if each.startswith("loop")]
    others = [each for each in known if each not in loops]
    return [f"loop={'+'.join(loops)}", *others] if loops else others


def name_command(flags) -> str:
    """Return the command that measures the same again, for any run."""
    words = ["--kinds", *flags.kinds] if flags.kinds else []
    for flag in ("num_images", "num_steps", "seed"):
        words += [f"--{flag.replace('_', '-')}", str(getattr(flags, flag))]
    return f"python experiments/families/translation.py RUN {' '.join(words)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--out", default="experiments/families/results")
    parser.add_argument("--name", default="translation")
    parser.add_argument(
        "--kinds",
        nargs="*",
        default=[],
        help="as of em_evaluation.adherence; default: loops as one",
    )
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-steps", type=int, default=600, help="of the segmenters")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)

    model = read_model(flags.run)
    config = config_from_dict(CycleGANConfig, model.config)
    source = load_data(config.source, config.tiles_of_source)
    target = load_data(config.data, config.tiles)
    pipeline = model.load()

    num_source = min(flags.num_images, source.held_out.num_tiles)  # labels are of tiles
    ids = choose(source.held_out, num_source, flags.seed)
    plain = source.held_out.batch(ids)
    translated = translate(pipeline, source.held_out, ids)
    real = target.held_out.batch(choose(target.held_out, flags.num_images, flags.seed + 1))
    trained_on = target.train.batch(choose(target.train, flags.num_images, flags.seed + 2))
    names = ("source before translation", "source after translation", "target, training tiles")
    distances = measure_distances(dict(zip(names, (plain, translated, trained_on))), real)

    kinds = parse_kinds(flags.kinds or join_loops(source.train, target.train), target.train.kinds)
    segmenter_config = SegmenterConfig(num_steps=flags.num_steps)
    of_target, of_source = (list_labelled(each.train, kinds) for each in (target, source))
    all_ids = torch.arange(source.train.num_tiles) * source.train.num_symmetries
    of_translated = put_images(of_source, translate(pipeline, source.train, all_ids))
    searcher, own, own_after = (
        train_searcher(labelled, kinds, segmenter_config, flags.seed)
        for labelled in (of_target, of_source, of_translated)
    )
    labelled = list_labelled(source.held_out, kinds)
    assert len(labelled) == source.held_out.num_tiles, "all of the source must be labelled"
    before = [labelled[i // source.held_out.num_symmetries] for i in ids.tolist()]
    after = put_images(before, translated)
    held_out = list_labelled(target.held_out, kinds)[: flags.num_images]
    rows = [
        describe_set(name, search_images(segmenter, images)[1])
        for name, segmenter, images in (
            ("target, held out", searcher, held_out),
            ("source after translation", searcher, after),
            ("source before translation", searcher, before),
            ("source, by a segmenter of its own", own, before),
            ("translated, by a segmenter of their own", own_after, after),
        )
    ]
    result = {
        "command": name_command(flags),
        "kinds": kinds,
        "date": date.today().isoformat(),
        "run": {
            "preset": model.about.get("preset"),
            "source": config.source,
            "target": Path(config.data).name,
            "train_seconds": model.train_seconds,
            "num_images_seen": model.num_images_seen,
        },
        "num_images": len(ids),
        "frechet_distance": distances,
        "adherence": rows,
    }
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{flags.name}.json", json.dumps(result, indent=1) + "\n")
    shown = torch.cat([plain[:SHOWN], translated[:SHOWN], real[:SHOWN]])
    save_image_grid(shown, out / f"{flags.name}.png", num_columns=SHOWN, min_width=1500)
    for name, distance in distances.items():
        print(f"{name:40} Frechet distance {distance:.1f}")
    for row in rows:
        recall, precision = (
            "{value:.3f} ({low:.3f} to {high:.3f})".format(**row[key])
            for key in ("recall", "precision")
        )
        print(f"{row['name']:40} recall {recall}, precision {precision}")


if __name__ == "__main__":
    main()
