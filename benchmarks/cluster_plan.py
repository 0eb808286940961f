"""Print a plan for many images on many GPUs, from figures measured here at small size.

    python benchmarks/cluster_plan.py                        # ten million images, a thousand GPUs
    python benchmarks/cluster_plan.py --gpus 8 --images-per-second 12

Measured here, in about two minutes: bytes of micrographs as PNG and of their files, seconds of
encoding, reading and hashing, of the marks and locks of a file, of a merge, and of a start, and the
operations of each network. The plan multiplies them; it is an estimate. `--tflops` is an
assumption: what a GPU sustains. Measure images/s on your own card (`benchmarks/gpu.py --parts
sampling`) and give them as `--images-per-second`.

The simulation draws stragglers and failures of workers for a thousand GPUs. Each file is written by
the functions of `generate.py --shard`, here, in the order in which it would be; a worker that fails
ends in the middle of a file. It then counts what is lost, doubled and drawn in vain.
"""

import argparse
import collections
import contextlib
import hashlib
import heapq
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from em_data.files import lock
from em_data.intensity import from_uint
from em_data.synthetic_micrographs import synthesise_micrograph
from em_evaluation import get_extractor
from em_generation.generate import Started
from em_generation.shards.check import find_fault
from em_generation.shards.features import _encode, read_feature_file
from em_generation.shards.files import OrderedWriter, create_sink
from em_generation.shards.plan import Plan, write_mark
from em_generation.shards.reading import ImageFile
from em_generation.shards.work import write_file

ROOT = Path(__file__).parents[1]
STEPS = 20  # of the sampler


def time_it(function, rounds=3, clock=time.process_time) -> float:
    """Return the median of the seconds that a function takes, of one core by default."""
    seconds = []
    for _ in range(rounds):
        began = clock()
        function()
        seconds.append(clock() - began)
    return float(np.median(seconds))


def measure_files(folder: Path, num=40) -> dict:
    """Measure bytes and seconds of 256 x 256 images in files of each format."""
    levels = np.stack([synthesise_micrograph(4 * i, 256).image for i in range(num)])
    images = from_uint(levels)[:, None]
    found = {}
    for bits in (8, 16):
        started = Started(None, {}, bits, 1.0, None, None)
        if bits == 16:  # grey levels that 8 bits do not hold
            rng = torch.Generator().manual_seed(0)
            noise = torch.rand(images.shape, generator=rng) * 2 - 1
            images = (images + noise / 255).clamp(-1, 1)
        for format, suffix in (("arrow", "arrow"), ("webdataset", "tar")):
            path = folder / f"file.{suffix}"

            def write(format=format, path=path, started=started, images=images):
                sink = create_sink(format, path, started)
                OrderedWriter(sink, range(num)).write(range(num), images)
                sink.close()

            seconds = time_it(write)
            file = ImageFile(path)
            found[f"{format}, {bits} bits"] = {
                "bytes_per_image": round(path.stat().st_size / num),
                "write_ms_per_image": 1000 * seconds / num,
                "read_ms_per_image": 1000 * time_it(lambda file=file: file.batch(range(num))) / num,
            }
    return found


def measure_metadata(folder: Path, num=50) -> dict:
    """Measure seconds of marks, locks and checks of one file, and of a start."""
    plan = Plan(folder / "plan", num, 1, "arrow")
    (plan.out / "data").mkdir(parents=True)

    def write_all():
        for i in range(num):
            with lock(plan.lock(i)):
                write_mark(plan, i, {"bytes": 1, "sha256": ""})

    per_file = time_it(write_all, 1, time.perf_counter) / num
    path = folder / "large"
    path.write_bytes(os.urandom(2**26))

    def hash_file():
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", "import em_commands.generate, datasets, diffusers"]
    began = os.times()
    subprocess.run(words, env=environment, check=True)
    ended = os.times()
    start = ended.children_user + ended.children_system
    start -= began.children_user + began.children_system
    return {
        "mark_and_lock_ms_per_file": 1000 * per_file,
        "sha256_mb_per_s": 2**26 / 1e6 / time_it(hash_file),
        "start_cpu_seconds": start,
    }


def measure_features(folder: Path, num=10_000) -> dict:
    """Measure bytes and seconds of files of 1,280 features."""
    rng = np.random.default_rng(0)
    sizes = {}
    for count in (num // 2, num):
        path = folder / f"features-{count}"
        facts = {"first": 0, "end": count}
        path.write_bytes(_encode(rng.normal(size=(count, 1280)).astype(np.float32), facts))
        sizes[count] = path.stat().st_size
    per_image = (sizes[num] - sizes[num // 2]) / (num // 2)
    first = read_feature_file(path)
    return {
        "bytes_per_image": per_image,
        "bytes_per_file": sizes[num] - num * per_image,
        "read_seconds_per_file": time_it(lambda: read_feature_file(path)),
        "merge_seconds_per_file": time_it(lambda: first.moments.merge(first.moments)),
    }


def count_operations() -> dict:
    """Return floating-point operations of one 256 x 256 image, of each network."""
    from em_diffusion.autoencoder import create_autoencoder
    from em_diffusion.denoiser import create_denoiser
    from em_diffusion.presets import base, paper, small

    found = {}
    for preset in (small, base, paper):
        config = preset()
        channels = config.autoencoder.latent_channels
        with torch.device("meta"):
            latents = torch.empty(1, channels, config.latent_size, config.latent_size)
            times = torch.zeros(1, dtype=torch.int64)
            denoiser = create_denoiser(config.denoiser, config.latent_size, channels)
            decoder = create_autoencoder(config.autoencoder, config.tiles.resolution)
        with torch.no_grad(), FlopCounterMode(display=False) as step:
            denoiser(latents, times)
        with torch.no_grad(), FlopCounterMode(display=False) as decode:
            decoder.decode(latents, force_not_quantize=True)
        found[f"LDM {preset.__name__}, {STEPS} steps"] = (
            STEPS * step.get_total_flops() + decode.get_total_flops()
        )
    extractor = get_extractor("efficientnet-lite0", resolution=256)
    with FlopCounterMode(display=False) as judge:
        extractor(torch.zeros(1, 1, 256, 256))
    return found | {"efficientnet-lite0": judge.get_total_flops()}


def make_plan(args, measured) -> dict:
    """Multiply what was measured by the numbers of images and GPUs."""
    num, per_file = args.num_images, args.images_per_file
    num_files = -(-num // per_file)
    plan = {"num_images": num, "gpus": args.gpus, "files": num_files}
    plan["image_terabytes"] = {
        name: num * each["bytes_per_image"] / 1e12 for name, each in measured["files"].items()
    }
    features = measured["features"]
    plan["feature_gigabytes"] = (
        num * features["bytes_per_image"] + num_files * features["bytes_per_file"]
    ) / 1e9
    rates = {
        name: args.tflops * 1e12 / operations for name, operations in measured["operations"].items()
    }
    if args.images_per_second:
        rates["your model"] = args.images_per_second
    plan["gpu_hours"] = {name: num / rate / 3600 for name, rate in rates.items()}
    plan["hours_on_all_gpus"] = {
        name: hours / args.gpus for name, hours in plan["gpu_hours"].items()
    }
    writes = [each["write_ms_per_image"] for each in measured["files"].values()]
    plan["core_hours_of_encoding"] = num * max(writes) / 3.6e6
    rate = max(rate for name, rate in rates.items() if name.startswith(("LDM", "your")))
    plan["cores_per_gpu_for_encoding"] = rate * max(writes) / 1000
    plan["gigabytes_per_second_to_disk"] = (
        args.gpus * rate * max(each["bytes_per_image"] for each in measured["files"].values()) / 1e9
    )
    metadata = measured["metadata"]
    plan["seconds_of_metadata"] = num_files * metadata["mark_and_lock_ms_per_file"] / 1000
    plan["core_hours_of_starts"] = args.gpus * metadata["start_cpu_seconds"] / 3600
    most = max(each["bytes_per_image"] for each in measured["files"].values())
    plan["core_hours_of_a_check"] = num * most / 1e6 / metadata["sha256_mb_per_s"] / 3600
    plan["minutes_of_a_merge"] = (
        num_files * (features["read_seconds_per_file"] + features["merge_seconds_per_file"]) / 60
    )
    return plan


class Failure(Exception):
    """A worker ends in the middle of a file."""


def simulate(
    args, images_per_file: int, num_shards: int, hours: float, start_hours: float, folder: Path
) -> dict:
    """Simulate an array of shards on `gpus` workers with stragglers and failures, with real marks.

    hours: Of all images on one GPU. start_hours: Of a start of a shard. A share of the workers
    takes three times as long. Workers fail at random; the shard starts again after five minutes.
    """
    rng = np.random.default_rng(args.seed)
    plan = Plan(folder, args.num_images, images_per_file, "arrow")
    (plan.out / "data").mkdir(parents=True)
    per_file = hours * images_per_file / args.num_images
    slow = np.where(rng.random(args.gpus) < args.straggling, 3.0, 1.0)
    waiting = collections.deque(range(num_shards))
    events = [(start_hours, worker, waiting.popleft()) for worker in range(args.gpus)]
    draws, vain, num_failures, end = np.zeros(plan.num_files, int), 0.0, 0, 0.0
    while events:
        now, worker, shard = heapq.heappop(events)
        left = [file for file in plan.share(shard, num_shards) if find_fault(plan, file)]
        if not left:
            if waiting:
                heapq.heappush(events, (now + start_hours, worker, waiting.popleft()))
            continue
        needed = per_file * slow[worker] * rng.lognormal(0, 0.1)
        fails_at = rng.exponential(args.hours_between_failures)

        def draw(file, path, fails=fails_at < needed):
            path.write_bytes(f"{file}\n".encode())
            if fails:
                raise Failure
            draws[file] += 1
            return {}

        if fails_at < needed:
            with contextlib.suppress(Failure):
                write_file(plan, left[0], draw)
            num_failures, vain = num_failures + 1, vain + fails_at
            heapq.heappush(events, (now + fails_at + 5 / 60 + start_hours, worker, shard))
            continue
        assert write_file(plan, left[0], draw)
        end = max(end, now + needed)
        heapq.heappush(events, (now + needed, worker, shard))
    contents = [int(plan.data(file).read_text()) for file in range(plan.num_files)]
    assert contents == list(range(plan.num_files))
    return {
        "images_per_file": images_per_file,
        "files": plan.num_files,
        "shards": num_shards,
        "failures": num_failures,
        "files_lost": int((draws == 0).sum()),
        "files_doubled": int((draws > 1).sum()),
        "hours": end,
        "hours_without_stragglers_and_failures": hours / args.gpus,
        "gpu_hours_in_vain": vain,
    }


def describe_machine() -> dict:
    """Return the processor and the date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"date": time.strftime("%Y-%m-%d"), "processor": names[0], "cores": os.cpu_count()}


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=10_000_000)
    parser.add_argument("--images-per-file", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--tflops", type=float, default=50, help="assumed, of a GPU in bf16")
    parser.add_argument("--images-per-second", type=float, help="of your model on one GPU")
    parser.add_argument("--straggling", type=float, default=0.02, help="share of slow workers")
    parser.add_argument("--hours-between-failures", type=float, default=1, help="of one worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args = parse(argv)
    torch.set_num_threads(1)
    memory = Path("/dev/shm")  # thousands of files of a simulation are flushed there at once
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as simulated,
    ):
        folder = Path(name)
        measured = {
            "files": measure_files(folder),
            "metadata": measure_metadata(folder),
            "features": measure_features(folder),
            "operations": count_operations(),
        }
        results = {
            "command": " ".join(["python", "benchmarks/cluster_plan.py", *(argv or sys.argv[1:])]),
            "machine": describe_machine(),
            "measured": measured,
            "plan": make_plan(args, measured),
            "simulations": [],
        }
        hours = results["plan"]["gpu_hours"][f"LDM paper, {STEPS} steps"]
        start_hours = measured["metadata"]["start_cpu_seconds"] / 3600
        fewer = max(1, args.images_per_file // 10)
        for images_per_file, num_shards in (
            (args.images_per_file, args.gpus),
            (fewer, args.gpus),
            (fewer, 10 * args.gpus),
        ):
            out = Path(simulated) / "simulation"
            results["simulations"].append(
                simulate(args, images_per_file, num_shards, hours, start_hours, out)
            )
            shutil.rmtree(out)
    text = json.dumps(results, indent=1, default=float)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return results


if __name__ == "__main__":
    main()
