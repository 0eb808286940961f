"""Generate and judge images in shards by workers that are killed, and compare with one process.

    python benchmarks/shards.py --out results.json
    python benchmarks/shards.py --num-images 2000 --images-per-file 100 --num-kills 3

Networks are tiny and random, so that what surrounds them is measured. Workers are forks of one
process, with the libraries loaded. Parts:

- killed: workers write the shards, some are killed at random times (SIGKILL). The rest is written
  by another number of shards. The bytes of all files must equal those of one process.
- features: the same for features; a single evaluation of all images must have the same moments to
  1e-9, and the same features in half precision.
- memory: peak memory of each command against the number of images.
- throughput: images/s of 1 and 2 workers, and the share lost to anything but the model. Model and
  whole file alternate in one process, so that a busy machine slows both.

Raises an `AssertionError` where something is lost, doubled or unequal.
"""

import argparse
import collections
import contextlib
import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

RESOLUTION, BATCH = 64, 50
PARTS = ("killed", "features", "memory", "throughput")
TOLERANCE = 1e-9


def load_libraries() -> None:
    """Import what workers need, once, and compute nothing: each of them is a fork."""
    import datasets
    import diffusers
    import transformers

    import em_generation.shards.merge  # noqa: F401

    torch.set_num_threads(1)
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_error()


def make_models(folder: Path) -> None:
    """Save a StyleGAN2 and a vision model, both tiny and random."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    from em_stylegan import EMStyleGANPipeline
    from em_stylegan.em_stylegan2_generator import StyleGAN2Generator

    torch.manual_seed(0)
    sizes = {"z_dim": 8, "w_dim": 8, "mapping_depth": 2, "channel_base": 64, "max_channels": 4}
    generator = StyleGAN2Generator(RESOLUTION, **sizes).eval()
    EMStyleGANPipeline(generator, pixel_size_nm=0.5).save_pretrained(folder / "model")
    vit = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vit |= {"intermediate_size": 256, "image_size": 32, "patch_size": 8}
    ViTModel(ViTConfig(**vit)).save_pretrained(folder / "extractor")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "extractor")


def generate(args, out: Path, shard: str, num_images: int | None = None, seed: int = 0) -> None:
    """Do what `generate.py --shard` does."""
    from em_generation.generate import GenerationConfig
    from em_generation.shards.plan import ShardOptions
    from em_generation.shards.work import generate_shard

    config = GenerationConfig(
        str(args.folder / "model"),
        str(out),
        num_images=num_images or args.num_images,
        seed=seed,
        batch_size=BATCH,
        format=args.format,
        precision="no",
        shards=ShardOptions(shard, images_per_file=args.images_per_file),
    )
    generate_shard(config)


def judge(args, out: Path, shard: str) -> None:
    """Do what `evaluate.py --features-of` does."""
    from em_generation.shards.features import write_features

    write_features(out, shard, [load_extractor(args)], batch_size=BATCH)


def load_extractor(args):
    from em_evaluation import get_extractor

    name = f"transformers:{args.folder / 'extractor'}"
    return get_extractor(name, resolution=RESOLUTION, device="cpu")


def merge(args, out: Path) -> None:
    """Do what `evaluate.py --merge` does."""
    from em_generation.evaluate import EvaluationConfig
    from em_generation.shards.merge import merge_and_compare

    config = EvaluationConfig(
        extractors=(f"transformers:{args.folder / 'extractor'}",),
        reference=str(args.folder / "real"),
        num_images=500,
        out=str(args.folder / "merged"),
        cache_dir=str(args.folder / "cache"),
    )
    merge_and_compare(config, [str(out)], torch.device("cpu"))


def check(out: Path) -> dict:
    """Do what `generate.py --check` does."""
    from em_generation.shards.check import check_shards

    found = check_shards(out)
    return {
        "is_whole": found.is_whole,
        "missing": len(found.missing),
        "damaged": len(found.damaged),
        "doubled": len(found.doubled),
        "half_written": len(found.remains),
    }


def fork(function, *words) -> tuple[int, Path]:
    """Start a worker, which has the libraries loaded; return its number and where it prints.

    The last line that it prints is what `function` returns, as JSON.
    """
    handle, name = tempfile.mkstemp(suffix=".txt")
    child = os.fork()
    if child:
        os.close(handle)
        return child, Path(name)
    code = 1
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        result = function(*words)
        print("\n" + json.dumps(result), flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(worker: tuple[int, Path], *, block: bool = True) -> dict | None:
    """Return what a worker returned, its CPU seconds and its peak memory; None while it runs."""
    child, path = worker
    found, status, usage = os.wait4(child, 0 if block else os.WNOHANG)
    if not found:
        return None
    text = path.read_text(errors="replace")
    path.unlink()
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), text[-3000:]
    return {
        "result": json.loads(text.splitlines()[-1]) if code == 0 else None,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
    }


def run(function, *words) -> dict:
    """Run a function in a worker to its end."""
    began = time.monotonic()
    found = finish(fork(function, *words))
    assert found is not None
    return {"seconds": round(time.monotonic() - began, 2)} | found


def measure(function, *words) -> dict:
    """Return the seconds, CPU seconds and peak memory of a function in a worker."""
    return {key: value for key, value in run(function, *words).items() if key != "result"}


def run_shards(function, args, out: Path, num_shards: int, rng=None, typical: float = 0) -> dict:
    """Run all shards, a few at a time; with `rng`, kill some at random. Return what was seen.

    A killed shard is not started again. typical: Seconds that a shard may take, at first.
    """
    waiting, running = collections.deque(range(1, num_shards + 1)), {}
    num_left = 0 if rng is None else args.num_kills
    num_killed, began = 0, time.monotonic()
    while waiting or running:
        while waiting and len(running) < args.num_workers:
            shard = waiting.popleft()
            worker = fork(function, args, out, f"{shard}/{num_shards}")
            # so many of all shards are killed, each at a random time of the first half of its work:
            # the last ones are quicker than those before, since fewer workers share the cores
            is_chosen = rng is not None and rng.random() * (len(waiting) + 1) < num_left
            num_left -= is_chosen
            fraction = rng.random() / 2 if is_chosen else None
            running[shard] = worker, time.monotonic(), fraction
        for shard, (worker, started, fraction) in list(running.items()):
            age = time.monotonic() - started
            if fraction is not None and age > fraction * typical:
                os.kill(worker[0], signal.SIGKILL)
                num_killed += 1
                finish(worker)
                del running[shard]
            elif finish_if_ended(worker):
                del running[shard]
                typical = age if fraction is None else typical
                num_left += fraction is not None  # it was too quick
        time.sleep(0.02)
    seconds = round(time.monotonic() - began, 1)
    return {"num_shards": num_shards, "num_killed": num_killed, "seconds": seconds}


def finish_if_ended(worker) -> bool:
    return finish(worker, block=False) is not None


def hash_files(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def measure_killed(args) -> dict:
    """Generate by killed workers and by one process, and compare."""
    rng, out, whole = random.Random(args.seed), args.folder / "killed", args.folder / "whole"
    one = measure(generate, args, whole, "1/1")
    typical = one["seconds"] * args.num_workers / args.num_shards
    seen = {"with_kills": run_shards(generate, args, out, args.num_shards, rng, typical)}
    found = run(check, out)["result"]
    assert not found["damaged"], found
    assert not found["doubled"], found
    seen["after_kills"] = found
    # the rest by another number of shards than before
    seen["rest"] = run_shards(generate, args, out, max(1, args.num_shards * 7 // 20))
    found = run(check, out)["result"]
    assert found["is_whole"], found
    assert not found["half_written"], found
    seen["after_the_rest"] = found
    files = hash_files(out / "data")
    assert files == hash_files(whole / "data"), "the bytes differ from those of one process"
    num_bytes = sum(path.stat().st_size for path in (out / "data").iterdir())
    shutil.rmtree(whole)
    return seen | {
        "num_images": args.num_images,
        "num_workers": args.num_workers,
        "num_files": len(files),
        "bytes": num_bytes,
        "files_that_differ_from_one_process": 0,
        "one_process": one,
    }


def compare_moments(args, out: Path) -> dict:
    """Compare merged features with a single evaluation of all images."""
    from em_data import read_image_folder
    from em_evaluation import compute_features
    from em_evaluation.moments import Moments
    from em_generation.shards.features import find_folder
    from em_generation.shards.merge import merge_features

    extractor = load_extractor(args)
    merged = merge_features(find_folder(out, extractor), args.num_images, seed=0)
    images = read_image_folder(f"datasets:{out}/data" if args.format == "webdataset" else out)
    features = compute_features(images, extractor, batch_size=BATCH, use_cache=False)
    assert features is not None
    whole = Moments.of(features)
    scale = np.sqrt(np.outer(np.diag(whole.scatter), np.diag(whole.scatter)))
    deviations = {
        "mean": float(np.abs(merged.moments.mean / whole.mean - 1).max()),
        "scatter": float((np.abs(merged.moments.scatter - whole.scatter) / scale).max()),
    }
    assert merged.moments.num == args.num_images
    assert max(deviations.values()) < TOLERANCE, deviations
    assert np.array_equal(merged.kept, features.astype(np.float16))
    return {
        "num_images": args.num_images,
        "num_features": extractor.num_features,
        "largest_relative_deviation_from_one_evaluation": deviations,
        "features_that_differ": 0,
    }


def measure_features(args) -> dict:
    """Write features by killed workers, merge them, and compare with a single evaluation."""
    rng, out = random.Random(args.seed + 1), args.folder / "killed"
    seen = {"with_kills": run_shards(judge, args, out, args.num_shards, rng, 1.0)}
    seen["rest"] = run_shards(judge, args, out, max(1, args.num_shards * 7 // 20))
    return seen | run(compare_moments, args, out)["result"]


def measure_memory(args) -> list[dict]:
    """Return the peak memory of each command for growing numbers of images, in small files."""
    rows, whole = [], args.images_per_file
    run(generate, args, args.folder / "real", "1/1", 500, 5)
    args.images_per_file = max(1, whole // 20)
    for part in (400, 40, 4, 1):
        num, out = max(BATCH, args.num_images // part), args.folder / f"memory-{part}"
        row = {"num_images": num, "images_per_file": args.images_per_file}
        row["generate"] = measure(generate, args, out, "1/1", num)
        row["features"] = measure(judge, args, out, "1/1")
        row |= {"merge": measure(merge, args, out), "check": measure(check, out)}
        shutil.rmtree(out)
        rows.append(row)
    args.images_per_file = whole
    return rows


def alternate(args, source: str, num: int) -> dict:
    """Draw alone and write a file in turn; return the seconds of each. A worker."""
    from em_generation import sampling
    from em_generation.generate import GenerationConfig, Progress, fill_options, start_drawing
    from em_generation.loading import read_model
    from em_generation.shards import work
    from em_generation.shards.files import OrderedWriter, create_sink
    from em_generation.shards.plan import Plan

    config = GenerationConfig(
        source, "unused", num_images=num, batch_size=BATCH, precision="no", format="arrow"
    )
    model = read_model(source)
    config = fill_options(config, model)
    started = start_drawing(config, model, torch.device("cpu"), Progress())
    batches = [list(range(i, min(i + BATCH, num))) for i in range(0, num, BATCH)]
    started.drawer.draw(sampling.pad(batches[0], BATCH, False))
    parts = {"model": [], "file": []}
    for _ in range(args.rounds):
        began = time.perf_counter()
        for batch in batches:
            started.drawer.draw(sampling.pad(batch, BATCH, False))
        parts["model"].append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            plan = Plan(Path(folder), num, num, "arrow")
            (plan.out / "data").mkdir()

            def draw(file, path, plan=plan):
                sink = create_sink("arrow", path, started)
                writer = OrderedWriter(sink, plan.numbers(file))
                sampling.draw_images(
                    started.drawer, plan.numbers(file), writer.write, batch_size=BATCH
                )
                sink.close()
                return {}

            began = time.perf_counter()
            assert work.write_files(plan, [0], draw) == [0]
            parts["file"].append(time.perf_counter() - began)
    return parts


def measure_throughput(args) -> list[dict]:
    """Return images/s of 1 and 2 workers with two models, and the share lost."""
    rows = []
    num_tiny = min(args.images_per_file, args.num_images)
    models = [("tiny StyleGAN2", str(args.folder / "model"), num_tiny)]
    models.append(("em-ldm-64", "em-ldm-64", max(BATCH, num_tiny // 50)))
    for title, model, num in models:
        for num_workers in (1, 2):
            workers = [fork(alternate, args, model, num) for _ in range(num_workers)]
            found = [finish(worker)["result"] for worker in workers]
            per_worker = [
                {
                    "images_per_second": num / statistics.median(each["file"]),
                    "model_images_per_second": num / statistics.median(each["model"]),
                    "share_lost": statistics.median(
                        1 - model / file for model, file in zip(each["model"], each["file"])
                    ),
                }
                for each in found
            ]
            rows.append(
                {
                    "model": title,
                    "num_workers": num_workers,
                    "images_per_round": num,
                    "rounds": args.rounds,
                    "images_per_second": sum(each["images_per_second"] for each in per_worker),
                    "share_lost": statistics.median(each["share_lost"] for each in per_worker),
                    "workers": per_worker,
                }
            )
    return rows


def describe_machine() -> dict:
    """Return the processor, the versions and the date."""
    import datasets
    import pyarrow

    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": os.cpu_count(),
        "load_average": [round(each, 1) for each in os.getloadavg()],
        "torch": torch.__version__,
        "datasets": datasets.__version__,
        "pyarrow": pyarrow.__version__,
    }


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=200_000)
    parser.add_argument("--images-per-file", type=int, default=10_000)
    parser.add_argument("--num-shards", type=int, default=20)
    parser.add_argument("--num-workers", type=int, default=4)
    parser.add_argument("--num-kills", type=int, default=10, help="of the workers of a part")
    parser.add_argument("--rounds", type=int, default=5, help="of the throughput")
    parser.add_argument("--format", choices=["arrow", "webdataset"], default="arrow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, help="for the images; default: a temporary one")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    args.command = " ".join(["python", "benchmarks/shards.py", *(argv or sys.argv[1:])])
    return args


def main(argv=None) -> dict:
    args = parse(argv)
    load_libraries()
    measures = {
        "killed": measure_killed,
        "features": measure_features,
        "memory": measure_memory,
        "throughput": measure_throughput,
    }
    results = {"command": args.command, "machine": describe_machine()}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        args.folder = Path(folder)
        run(make_models, args.folder)
        for part in args.parts:
            began = time.monotonic()
            results[part] = measures[part](args)
            results[f"{part}_seconds"] = round(time.monotonic() - began)
            print(json.dumps({part: results[part]}), flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
