"""Write the files of one shard: each is drawn, written under a temporary name, renamed, marked."""

import contextlib
import dataclasses
import hashlib
import json
import secrets
import time
from pathlib import Path
from typing import Any

from em_data.files import flush_to_disk, lock, make_folder, name_full_disk, write_atomically
from em_generation.folder import RECORD, read_matching_record, refuse_foreign_folder
from em_generation.generate import (
    GenerationConfig,
    Progress,
    Started,
    draw_missing,
    fill_options,
    say,
    start_drawing,
)
from em_generation.loading import Model, read_model
from em_generation.shards.check import find_fault, read_command
from em_generation.shards.files import OrderedWriter, create_sink
from em_generation.shards.plan import (
    SUFFIXES,
    Plan,
    ShardOptions,
    parse_shard,
    read_mark,
    read_plan,
    write_mark,
)
from em_generation.store import write_index
from em_training import create_process_state


@dataclasses.dataclass(frozen=True)
class Written:
    """What a worker did: files that it wrote, files that were done, and the plan of the folder."""

    files: tuple[int, ...]
    num_done_before: int
    plan: Plan


def generate_shard(
    config: GenerationConfig, model: Model | None = None, command: str = ""
) -> Written:
    """Write the files of a shard that are missing or damaged.

    Several processes may call this at once, also for overlapping shards. Each file is written by
    one of them, and all files of the shard are done when the function returns.

    Args:
        config: What to generate, and which files of it, `shards`. Its format is "arrow" or
            "webdataset".
        model: `read_model(config.model)`, if the caller has it already.
        command: The command line without --shard, which `check` prints.

    Raises:
        ValueError: The folder holds images of other settings, or the model diverged.
        OSError: The disk is full. Files that are done are whole.
    """
    if config.format not in SUFFIXES:
        raise ValueError(f"--format is {config.format}, but shards are arrow or webdataset.")
    shards: ShardOptions = config.shards
    assert shards.shard is not None
    model = read_model(config.model) if model is None else model
    config = fill_options(config, model)
    state = create_process_state()
    progress, out = Progress(), Path(config.out)
    refuse_foreign_folder(out)
    started = start_drawing(config, model, state.device, progress)
    if config.format == "arrow":
        started.create_store(out, "arrow")  # refuses labels that columns cannot hold
    with name_full_disk(out):
        plan = open_folder(out, config, started, shards.images_per_file, command)
        index, number = parse_shard(shards.shard)
        index, number = (
            index * state.num_processes + state.process_index,
            number * state.num_processes,
        )

        def draw(file: int, path: Path) -> dict[str, Any]:
            began, numbers = time.monotonic(), plan.numbers(file)
            sink = create_sink(config.format, path, started)
            writer, part = OrderedWriter(sink, numbers), f"{plan.name(file)} "
            draw_missing(
                started.drawer, numbers, config, model, writer.write, state, progress, part
            )
            sink.close()
            return {"seed": config.seed, "seconds": round(time.monotonic() - began, 3)}

        files = plan.share(index, number)
        written = write_files(plan, files, draw)
        if config.format == "arrow" and len(plan.list_marked()) >= plan.num_files:
            paths = [plan.data(file) for file in range(plan.num_files)]
            with lock(out / ".locks" / "record.lock"):
                # else who writes the rest does this, or who extends the folder
                if read_plan(out) == plan and all(path.is_file() for path in paths):
                    write_index(out, [f"data/{path.name}" for path in paths])
    return Written(tuple(written), len(files) - len(written), plan)


def open_folder(
    out: Path, config: GenerationConfig, started: Started, images_per_file: int, command: str
) -> Plan:
    """Write the record of the folder, or compare the settings with it; return the plan.

    A larger number of images than before extends the folder, a smaller one is the same work.
    """
    record = started.record
    record["settings"] = record["settings"] | {"images_per_file": images_per_file}
    with lock(out / ".locks" / "record.lock"):
        refuse_foreign_folder(out)
        before = read_matching_record(out, record) or {}
        num_images = max(config.num_images, before.get("num_images", 0))
        if num_images != before.get("num_images"):
            record["num_images"] = num_images
            write_atomically(out / RECORD, json.dumps(record, indent=2) + "\n")
        make_folder(out / "data")  # after the record, since others know the folder by it
        make_folder(out / "done")
        if command and read_command(out) != command:
            write_atomically(out / ".command", command + "\n")
    if num_images > config.num_images:
        say(
            f"{out} is planned for {num_images:,} images, more than --num-images "
            f"{config.num_images}; all of them are written."
        )
    return Plan(out, num_images, images_per_file, config.format)


def write_files(plan: Plan, files, draw) -> list[int]:
    """Write each file that is not done yet; return those written.

    Files that another process is writing come last: by then it has written them or has ended.

    draw: (file, path) -> facts for the mark; it writes the file.
    """
    written, others = [], []
    for file in files:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(lock(plan.lock(file), "held"))
            except ValueError:
                others.append(file)
                continue
            if write_file(plan, file, draw):
                written.append(file)
    for file in others:
        with lock(plan.lock(file)):
            if write_file(plan, file, draw):
                written.append(file)
    return written


def write_file(plan: Plan, file: int, draw) -> bool:
    """Write a file unless it is done; return whether it was written. The caller holds its lock."""
    fault = find_fault(plan, file)
    if fault is None:
        return False
    if read_mark(plan, file) is not None:
        say(f"{plan.data(file)} {fault}; it is written again")
        plan.mark(file).unlink()
    path = plan.data(file)
    for remains in path.parent.glob(f".{path.name}.*"):  # of a killed process
        remains.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        facts = draw(file, temporary)
        with temporary.open("rb") as opened:
            facts |= {
                "bytes": temporary.stat().st_size,
                "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
            }
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)
    write_mark(plan, file, facts)
    return True
