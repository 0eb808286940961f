"""Autoencoders at equal training time: how near their images come to real ones.

    python benchmarks/autoencoder_arms.py --seconds 60 --seeds 0 1 2 --out FOLDER

Every arm trains on the embedded micrographs of the preset `demo` (64 x 64) for the same CPU seconds
on one thread, by `train_ldm.py demo --last-stage autoencoder` with the arm's flags. The number of
images that fit is found from two short trainings. A linear basis is fitted in seconds, whatever the
budget. Then 1,000 training tiles pass through the autoencoder, with and without the measured grain,
and are compared with 1,000 held-out tiles (efficientnet-lite0): no diffusion model of its latents
can be expected to come nearer. Real training tiles stand beside them.

Results are one JSON line per arm and seed in OUT/autoencoder_arms.jsonl, and a table of medians. A
second start does only what is missing.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from em_data import DataConfig, load_data
from em_diffusion.drawing import reconstruct
from em_diffusion.grain import fit_grain
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.reconstruction import psnr
from em_diffusion.validation import read_spaced_images
from em_evaluation import compute_features, get_extractor
from em_evaluation.feature_metrics import measure_values
from em_evaluation.images import read_images, transform_images

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("frechet_distance", "precision", "recall")
NUM_IMAGES = 1000
F8, P8 = "--autoencoder.block-out-channels 8 32 64 64", "--autoencoder.patch-size 8"
F4, P4 = "--autoencoder.block-out-channels 16 32 64", "--autoencoder.patch-size 4"
TRAINED = (
    "--autoencoder.layers-per-block 1 --autoencoder.norm-num-groups 8 "
    "--autoencoder.no-mid-attention --autoencoder.perceptual-weight 1 "
    "--autoencoder.batch-size 16 --autoencoder.learning-rate 2e-3 --autoencoder.warmup-images 320 "
    "--autoencoder.num-codes 2048 --autoencoder.revive-after-images 512"
)
ARMS = {
    "vq f8, 8 channels": f"--autoencoder.kind vq --autoencoder.latent-channels 8 {F8} {TRAINED}",
    "kl f8, 8 channels": f"--autoencoder.kind kl --autoencoder.latent-channels 8 {F8} {TRAINED}",
    "kl f8, 16 channels": f"--autoencoder.kind kl --autoencoder.latent-channels 16 {F8} {TRAINED}",
    "kl f4, 4 channels": f"--autoencoder.kind kl --autoencoder.latent-channels 4 {F4} {TRAINED}",
    "basis f8, 8 channels": f"--autoencoder.kind basis --autoencoder.latent-channels 8 {P8}",
    "basis f8, 16 channels": f"--autoencoder.kind basis --autoencoder.latent-channels 16 {P8}",
    "basis f4, 2 channels": f"--autoencoder.kind basis --autoencoder.latent-channels 2 {P4}",
    "basis f4, 4 channels": f"--autoencoder.kind basis --autoencoder.latent-channels 4 {P4}",
}
PROBES = (320, 960)  # images of the two short trainings that find the speed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder_arms"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "autoencoder_arms.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    judge = Judge()
    for arm in options.arms:
        for seed in options.seeds:
            key = {"arm": arm, "seed": seed, "seconds": options.seconds}
            if any(key.items() <= line.items() for line in lines):
                continue
            line = key | judge.measure(train(arm, seed, options.seconds, options.out))
            lines.append(line)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    print_table([line for line in lines if line["seconds"] == options.seconds], judge.real)


def train(arm: str, seed: int, seconds: float, out: Path) -> Path:
    """Train an arm for so many CPU seconds and return the folder of the run."""
    run = out / f"{arm.replace(',', '').replace(' ', '-')}-{seed}-{seconds:g}s"
    if (run / "autoencoder" / "result.json").exists():
        return run
    if "basis" in arm:
        run_training(arm, seed, run, 4_000)
        return run
    costs = [run_training(arm, seed, out / "probe", count) for count in PROBES]
    per_image = (costs[1] - costs[0]) / (PROBES[1] - PROBES[0])
    run_training(arm, seed, run, max(16, int(seconds / per_image)))
    return run


def run_training(arm: str, seed: int, run: Path, num_images: int) -> float:
    """Train in a fresh folder; return the CPU seconds of the process."""
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, ROOT / "train_ldm.py", "demo", "--out", run, *ARMS[arm].split()]
    command += ["--last-stage", "autoencoder", "--seed", seed, "--autoencoder.seed", seed]
    command += ["--autoencoder.num-images", num_images]
    intervals = ("log", "validate", "sample", "checkpoint")
    for name in intervals:
        command += [f"--autoencoder.{name}-every", 10**9]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [str(each) for each in command], check=True, env=environment, capture_output=True, cwd=ROOT
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Judge:
    """Measures reconstructions of training tiles against held-out tiles."""

    def __init__(self):
        tiles = DataConfig(resolution=64, symmetries="paper", held_out_fraction=0.33)
        data = load_data("synthetic", tiles, log=lambda text: None)
        self.train, self.held_out = data.train, read_images(data.held_out, NUM_IMAGES, 0)
        self.originals = read_images(data.train, NUM_IMAGES, 1)
        self.extractor = get_extractor("efficientnet-lite0", resolution=64, device="cpu")
        self.features = compute_features(self.held_out, self.extractor, use_cache=False)
        self.real = self.compare(self.originals)

    def compare(self, images) -> dict[str, float]:
        features = compute_features(images, self.extractor, use_cache=False)
        return measure_values(METRICS, features, self.features)

    def measure(self, run: Path) -> dict:
        """Return the numbers of the autoencoder of a run."""
        model = load_autoencoder(run)
        views = read_spaced_images(self.train, NUM_IMAGES)
        grain = fit_grain(views, torch.cat([reconstruct(model, part) for part in views.split(64)]))
        rng = torch.Generator().manual_seed(0)
        plain = transform_images(self.originals, lambda part: reconstruct(model, part))
        grainy = transform_images(
            self.originals, lambda part: reconstruct(model, part, grain, generator=rng)
        )
        held_out = self.held_out.batch(range(NUM_IMAGES))
        decoded = torch.cat([reconstruct(model, part) for part in held_out.split(64)])
        result = json.loads((run / "autoencoder" / "result.json").read_text())
        return {
            "num_images_seen": result["num_images_seen"],
            "without_grain": self.compare(plain),
            "with_grain": self.compare(grainy),
            "psnr_db": float(psnr(held_out, decoded).mean()),
        }


def print_table(lines, real):
    """Print medians over seeds, best arm first."""
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]

        def median(part, name, own=own):
            return statistics.median(line[part][name] for line in own)

        distances = [line["with_grain"]["frechet_distance"] for line in own]
        rows.append(
            (
                statistics.median(distances),
                f"| {arm} | {own[0]['num_images_seen']:,} | {statistics.median(distances):.1f} "
                f"({min(distances):.1f} to {max(distances):.1f}) "
                f"| {median('with_grain', 'recall'):.2f} "
                f"| {median('without_grain', 'frechet_distance'):.1f} "
                f"| {statistics.median(line['psnr_db'] for line in own):.1f} |",
            )
        )
    print("| arm | images | distance with grain (range) | recall | without grain | PSNR (dB) |")
    print("|---|---|---|---|---|---|")
    for _, row in sorted(rows):
        print(row)
    print(f"\nReal training tiles: {real['frechet_distance']:.1f}, recall {real['recall']:.2f}.")


if __name__ == "__main__":
    main()
