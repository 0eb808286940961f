"""How fast the evaluation is: the Frechet distance, and Inception's features.

    python benchmarks/evaluation.py                      # an hour on 2 slow cores
    python benchmarks/evaluation.py --num-tiles 100      # fewer tiles

The distance is timed against scipy's matrix root at 2048 dimensions, the features against
pytorch-fid's loop: PNG files through PIL and a DataLoader in batches of 50, three channels,
float32, the network as published (clean-fid's copy). Both sides have the same files and the same
weights: random ones, with batch norms set by one pass over the first tiles. It prints one JSON
line per figure, with the ratio to the baseline of the same run (how many times as fast ours is).

On one thread (--threads 1) seconds are the process's own, which other programs do not disturb;
otherwise they are wall time.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import scipy
import torch
from sampler_points import choose_clock
from scipy import linalg

from em_data import DataConfig, load_data, read_image_folder
from em_evaluation.distances import frechet_distance
from em_evaluation.feature_cache import compute_features
from em_evaluation.images import read_images
from em_evaluation.inception import Inception, load_pytorch_inception


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-tiles", type=int, default=2000, help="tiles that both loops read")
    parser.add_argument("--dimensions", type=int, default=2048, help="of the statistics")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.num_tiles < 8 or arguments.dimensions < 8:
        parser.error("--num-tiles and --dimensions must be at least 8")
    torch.set_num_threads(arguments.threads)
    facts = {
        "num_threads": arguments.threads,
        "clock": "CPU time" if arguments.threads == 1 else "wall time",
    }
    facts |= {"torch": torch.__version__, "scipy": scipy.__version__}
    print(json.dumps(time_distance(arguments.dimensions) | facts), flush=True)
    print(json.dumps(time_features(arguments.num_tiles, arguments.batch_size) | facts), flush=True)


def time_distance(dimensions, seed=0) -> dict:
    """Time the distance against pytorch-fid's tr (S_a S_b)^(1/2) by scipy's sqrtm."""
    rng = np.random.default_rng(seed)
    decay = np.exp(-np.arange(dimensions) / dimensions * 6)  # a spectrum like that of features
    a, b = (
        rng.normal(size=(2 * dimensions, dimensions)) * np.sqrt(decay) * scale
        for scale in (1.0, 1.2)
    )
    ours, fast_seconds = _time(lambda: frechet_distance(a, b))

    def plain():
        covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = linalg.sqrtm(covariance_a @ covariance_b).real
        shift = a.mean(0) - b.mean(0)
        return shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(root)

    theirs, plain_seconds = _time(plain)
    return {
        "name": "Frechet distance of features, seconds",
        "ours": round(fast_seconds, 6),
        "baseline": round(plain_seconds, 6),
        "ratio": round(plain_seconds / fast_seconds, 2),
        "baseline_is": "scipy's sqrtm of the product of the covariances",
        "dimensions": dimensions,
        "relative_difference": float(abs(ours - theirs) / theirs),
    }


def time_features(num_tiles, batch_size) -> dict:
    """Time Inception's features of PNG files against the plain loop, and compare both distances."""
    with tempfile.TemporaryDirectory() as folder:
        files, weights = write_tiles(Path(folder), num_tiles), make_weights(Path(folder))
        plain_network = load_pytorch_inception(weights).eval()
        extractor = Inception("legacy_pytorch", weights)
        half = len(files) // 2
        images = read_image_folder(Path(folder) / "tiles")
        run_plain(plain_network, files[:2], batch_size)  # warm up both
        compute_features(images.batch(range(2)), extractor, use_cache=False)
        fast, fast_seconds = _time(
            lambda: compute_features(images, extractor, batch_size=batch_size, use_cache=False)
        )
        plain, plain_seconds = _time(lambda: run_plain(plain_network, files, batch_size))
    distances = [frechet_distance(features[:half], features[half:]) for features in (fast, plain)]
    return {
        "name": "Inception's features, images per second",
        "ours": round(len(files) / fast_seconds, 4),
        "baseline": round(len(files) / plain_seconds, 4),
        "ratio": round(plain_seconds / fast_seconds, 2),
        "baseline_is": "PNG by PIL and a DataLoader, three channels, float32, network as published",
        "num_tiles": len(files),
        "batch_size": batch_size,
        "relative_difference_of_distance": float(abs(distances[0] - distances[1]) / distances[1]),
        "greatest_difference_of_features": float(np.abs(fast - plain).max() / plain.std()),
    }


def write_tiles(folder, num_tiles):
    """Write views of the embedded micrographs' tiles as 8-bit PNG; return their paths in order."""
    data = load_data("synthetic", DataConfig(resolution=64), log=lambda text: None)
    tiles = folder / "tiles"
    tiles.mkdir()
    levels = read_images(data.train, min(num_tiles, data.train.num_views)).levels[:, 0]
    paths = [tiles / f"{i:06d}.png" for i in range(len(levels))]
    for path, image in zip(paths, levels):
        PIL.Image.fromarray(image).save(path)
    return paths


def make_weights(folder):
    """Write a random Inception-v3 with batch norms set by noise, so that features stay finite."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of slow initialisation
        state = inception_v3(
            weights=None, num_classes=1008, aux_logits=False, init_weights=False
        ).state_dict()
    path = folder / "weights.pth"
    torch.save(state, path)
    network = load_pytorch_inception(path)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(
            torch.nn.functional.interpolate(torch.rand(8, 1, 24, 24), 299).expand(-1, 3, -1, -1)
        )
    blocks = network.state_dict()  # the same tensors in the order of the network's own names
    names = [name for name in state if not name.startswith("fc.")]
    taken = dict(zip(names, (blocks[name] for name in blocks)))
    torch.save(
        state | {name: value for name, value in taken.items() if value.shape == state[name].shape},
        path,
    )
    return path


class _Files(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from torchvision.transforms.functional import to_tensor

        return to_tensor(PIL.Image.open(self.paths[index]).convert("RGB"))


def run_plain(network, paths, batch_size):
    """Compute features as pytorch-fid does."""
    loader = torch.utils.data.DataLoader(_Files(paths), batch_size=batch_size, num_workers=0)
    features = []
    with torch.no_grad():
        for batch in loader:
            batch = torch.nn.functional.interpolate(
                batch, size=(299, 299), mode="bilinear", align_corners=False
            )
            features.append(network(batch)[0].squeeze(3).squeeze(2).numpy())
    return np.concatenate(features)


def _time(function):
    clock = choose_clock("cpu")
    start = clock()
    result = function()
    return result, clock() - start


if __name__ == "__main__":
    main()
