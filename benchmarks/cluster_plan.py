"""Print a plan for many images on many GPUs, from figures measured here at small size.

    python benchmarks/cluster_plan.py                        # ten million images, a thousand GPUs
    python benchmarks/cluster_plan.py --gpus 8 --images-per-second 12

Measured here, in about two minutes: bytes of micrographs as PNG and of their files, seconds of
encoding, reading and hashing, of the marks and locks of a file, of a merge, and of a start, and the
operations of each network. The plan multiplies them; it is an estimate. `--tflops` is an
assumption: what a GPU sustains. Measure images/s on your own card (`benchmarks/gpu.py --parts
sampling`) and give them as `--images-per-second`.

The simulation draws stragglers and failures for a thousand GPUs. Each worker is a thread that runs
what `generate.py --shard` runs, with real files, marks and locks, in simulated time; a worker that
fails ends in the middle of a file and leaves it. Idle workers begin unfinished shards a second
time. It then counts what is lost, doubled and drawn in vain.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import heapq
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from em_data.files import lock
from em_data.intensity import from_uint
from em_data.synthetic_micrographs import synthesise_micrograph
from em_evaluation import get_extractor
from em_generation.generate import Started
from em_generation.shards import work
from em_generation.shards.check import find_fault
from em_generation.shards.features import _encode, read_feature_file
from em_generation.shards.files import OrderedWriter, create_sink
from em_generation.shards.plan import Plan, write_mark
from em_generation.shards.reading import ImageFile

ROOT = Path(__file__).parents[1]
STEPS = 20  # of the sampler
FILES_OF_A_FILE = 5  # images, mark, lock, features, lock of the features
COUNT_FILES = """
import sys
opened = set()
sys.addaudithook(lambda event, words: event == "open" and opened.add(str(words[0])))
import em_commands.generate, datasets, diffusers
opened |= {module.__file__ for module in list(sys.modules.values())
           if (getattr(module, "__file__", None) or "").endswith((".so", ".pyd"))}
print(len(opened))
"""  # opened to import what a worker needs: compiled modules, and .pyc files or sources


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
    words = [sys.executable, "-c", COUNT_FILES]
    began = os.times()
    counted = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    ended = os.times()
    start = ended.children_user + ended.children_system
    start -= began.children_user + began.children_system
    return {
        "mark_and_lock_ms_per_file": 1000 * per_file,
        "sha256_mb_per_s": 2**26 / 1e6 / time_it(hash_file),
        "start_cpu_seconds": start,
        "start_files": int(counted.stdout.split()[-1]),
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
    plan["files_and_locks"] = FILES_OF_A_FILE * num_files
    plan["files_opened_by_starts"] = args.gpus * metadata["start_files"]
    plan["core_hours_of_starts"] = args.gpus * metadata["start_cpu_seconds"] / 3600
    most = max(each["bytes_per_image"] for each in measured["files"].values())
    plan["core_hours_of_a_check"] = num * most / 1e6 / metadata["sha256_mb_per_s"] / 3600
    plan["minutes_of_a_merge"] = (
        num_files * (features["read_seconds_per_file"] + features["merge_seconds_per_file"]) / 60
    )
    return plan


class Failure(Exception):
    """A worker ends in the middle of a file."""


class Clock:
    """Simulated time for threads: one runs at a time, the one whose sleep ends first."""

    def __init__(self) -> None:
        self.now, self.sleeping, self.order = 0.0, [], itertools.count()
        self.idle = threading.Semaphore(0)
        self.errors: list[BaseException] = []

    def sleep(self, hours: float) -> None:
        woken = threading.Event()
        heapq.heappush(self.sleeping, (self.now + hours, next(self.order), woken))
        self.idle.release()
        woken.wait()

    def run(self, functions) -> None:
        """Run functions that sleep, each in a thread, until all have ended."""
        threads = [threading.Thread(target=self._call, args=(each,)) for each in functions]
        for thread in threads:
            thread.start()
            self.idle.acquire()
        while self.sleeping:
            self.now, _, woken = heapq.heappop(self.sleeping)
            woken.set()
            self.idle.acquire()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _call(self, function) -> None:
        try:
            function()
        except BaseException as error:
            self.errors.append(error)
        finally:
            self.idle.release()

    @contextlib.contextmanager
    def lock(self, path, message=None):
        """Hold a real lock; wait for it in simulated time."""
        with contextlib.ExitStack() as held:
            while True:
                try:
                    held.enter_context(lock(path, "held"))
                    break
                except ValueError:
                    if message is not None:
                        raise
                    self.sleep(1 / 60)
            yield


class Array:
    """Workers that write the shards of a plan, with stragglers and failures.

    A share of the workers takes three times as long. Workers fail at random; the shard starts again
    after five minutes. When no shard is left, an idle worker takes one that is not finished, beside
    the worker that has it.
    """

    def __init__(self, args, plan: Plan, num_shards: int, hours_per_file: float, start: float):
        self.args, self.plan, self.num_shards = args, plan, num_shards
        self.hours_per_file, self.start_hours = hours_per_file, start
        rng = np.random.default_rng(args.seed)
        self.slow = np.where(rng.random(args.gpus) < args.straggling, 3.0, 1.0)
        self.clock, self.waiting = Clock(), collections.deque(range(num_shards))
        self.draws, self.times_shared = np.zeros(plan.num_files, int), collections.Counter()
        self.num_failures, self.hours_in_vain, self.end = 0, 0.0, 0.0

    def run(self) -> None:
        workers = [functools.partial(self.work, worker) for worker in range(self.args.gpus)]
        with unittest.mock.patch.object(work, "lock", self.clock.lock):
            self.clock.run(workers)

    def work(self, worker: int) -> None:
        """Write one shard after the other, as the tasks of an array do."""
        rng = np.random.default_rng([self.args.seed, worker])
        while (shard := self.take()) is not None:
            files, is_done = self.plan.share(shard, self.num_shards), False
            while not is_done:
                self.clock.sleep(self.start_hours)
                with contextlib.suppress(Failure):
                    work.write_files(self.plan, files, functools.partial(self.draw, worker, rng))
                    is_done = True

    def take(self) -> int | None:
        """Return a shard that nobody has begun; else an unfinished one, once; else None."""
        if self.waiting:
            return self.waiting.popleft()
        unfinished = {file % self.num_shards for file in np.flatnonzero(self.draws == 0)}
        shared = [shard for shard in sorted(unfinished) if not self.times_shared[shard]]
        self.times_shared.update(shared[:1])
        return shared[0] if shared else None

    def draw(self, worker: int, rng, file: int, path: Path) -> dict:
        needed = self.hours_per_file * self.slow[worker] * rng.lognormal(0, 0.1)
        fails_at = rng.exponential(self.args.hours_between_failures)
        path.write_bytes(b"half of")
        self.clock.sleep(min(needed, fails_at))
        if fails_at < needed:
            path.rename(path.with_name(f"{path.name}.killed"))  # which a kill leaves
            self.num_failures += 1
            self.hours_in_vain += fails_at
            self.clock.sleep(5 / 60)
            raise Failure
        path.write_bytes(f"{file}\n".encode())
        self.draws[file] += 1
        self.end = self.clock.now
        return {}


def simulate(
    args, images_per_file: int, num_shards: int, hours: float, start_hours: float, folder: Path
) -> dict:
    """Simulate an array of shards on `gpus` workers, with real files, marks and locks.

    hours: Of all images on one GPU. start_hours: Of a start of a shard.
    """
    plan = Plan(folder, args.num_images, images_per_file, "arrow")
    (plan.out / "data").mkdir(parents=True)
    per_file = hours * images_per_file / args.num_images
    array = Array(args, plan, num_shards, per_file, start_hours)
    array.run()
    contents = [plan.data(file).read_text() for file in range(plan.num_files)]
    faults = [find_fault(plan, file) for file in range(plan.num_files)]
    names = {path.name for path in (plan.out / "data").iterdir()}
    return {
        "images_per_file": images_per_file,
        "files": plan.num_files,
        "shards": num_shards,
        "failures": array.num_failures,
        "shards_begun_twice": array.times_shared.total(),
        "files_lost": sum(
            fault is not None or content != f"{file}\n"
            for file, (fault, content) in enumerate(zip(faults, contents, strict=True))
        ),
        "files_doubled": int((array.draws > 1).sum()),
        "files_left_over": len(names) - plan.num_files,
        "hours": array.end,
        "hours_without_stragglers_and_failures": hours / args.gpus,
        "gpu_hours_in_vain": array.hours_in_vain,
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
