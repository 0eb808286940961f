"""Compare the loader's tiles per second with decoding PNG tiles one by one, on one thread.

    python benchmarks/data_loading.py [--resolution 256] [--data FOLDER]

Both sides make float32 batches [64, 1, R, R] in [-1, 1] of the same views in the same order; a
check holds them equal. The baseline reads a PNG file, decodes it with PIL, turns or flips it,
makes a float tensor and stacks. Rounds alternate and the best of each side counts, so that a busy
machine slows both. Prints one JSON line per figure.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from em_data import BatchLoader, DataConfig, ImageSampler, load_data
from em_data.views import apply_symmetry

BATCH_SIZE = 64


def write_png_tiles(tiles, folder):
    paths = [folder / f"{i:06d}.png" for i in range(tiles.num_tiles)]
    for i, path in enumerate(paths):
        PIL.Image.fromarray(tiles.raw([i])[0]).save(path)
    return paths


def read_png_batch(tiles, paths, view_ids):
    images = []
    for tile, symmetry in zip(*tiles.locate(view_ids)):
        with PIL.Image.open(paths[tile]) as image:
            pixels = apply_symmetry(np.array(image), tiles.symmetries[symmetry])
        images.append(
            torch.from_numpy(np.ascontiguousarray(pixels))[None].float().div(127.5).sub(1)
        )
    return torch.stack(images)


def time_batches(next_batch, num_batches):
    start = time.perf_counter()
    for i in range(num_batches):
        next_batch(i)
    return num_batches * BATCH_SIZE / (time.perf_counter() - start)


def measure(data, paths, num_rounds=7):
    """Return the best tiles per second of the loader and of the baseline."""
    tiles, sampler = data.train, ImageSampler(data.train.num_views, seed=0)
    loader = iter(BatchLoader(tiles, sampler, batch_size=BATCH_SIZE))

    def read_pngs(i):
        return read_png_batch(tiles, paths, sampler.indices(i * BATCH_SIZE, BATCH_SIZE))

    difference = (next(loader).images - read_pngs(0)).abs().max().item()
    assert difference < 1e-6, f"the two sides differ by {difference}"
    rates = [
        (time_batches(lambda i: next(loader), 20), time_batches(read_pngs, 4))
        for _ in range(num_rounds)
    ]
    return [max(each) for each in zip(*rates)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="synthetic", help="folder of 8-bit micrographs, or 'synthetic'"
    )
    parser.add_argument("--resolution", type=int, default=256, help="side of a tile in pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        num = 8 if arguments.data == "synthetic" else None
        config = DataConfig(
            resolution=arguments.resolution,
            num_micrographs=num,
            micrograph_size=1024,
            cache_dir=folder,
        )
        start = time.perf_counter()
        data = load_data(arguments.data, config, log=lambda line: None)
        first_start = time.perf_counter() - start
        start = time.perf_counter()
        load_data(arguments.data, config, log=lambda line: None)
        second_start = time.perf_counter() - start
        paths = write_png_tiles(data.train, Path(folder))
        ours, baseline = measure(data, paths)
    facts = {
        "resolution": arguments.resolution,
        "batch_size": BATCH_SIZE,
        "num_threads": 1,
        "data": data.summary["name"],
    }
    rate = {
        "ours": round(ours, 1),
        "baseline": round(baseline, 1),
        "ratio": round(ours / baseline, 2),
    }
    print(
        json.dumps(
            {
                "name": "tiles per second",
                **rate,
                "baseline_is": "PNG tiles decoded one by one",
                **facts,
            }
        )
    )
    starts = {
        "ours": round(second_start, 4),
        "baseline": round(first_start, 4),
        "ratio": round(first_start / second_start, 1),
    }
    print(
        json.dumps(
            {
                "name": "seconds to start",
                **starts,
                "baseline_is": "first start, which cuts",
                **facts,
            }
        )
    )


if __name__ == "__main__":
    main()
