"""The folder of a generation: who may write there, and the record of its settings."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from em_data.files import LOCK, leave_nothing_if_refused, lock, write_atomically
from em_generation.store import remove_remains, scan_names
from em_training.nodes import ask_main_process

RECORD = "generation.json"


def refuse_foreign_folder(out: Path) -> None:
    """Refuse a folder that holds anything but generated images, before anything is written.

    Hidden files do not count: a killed process may leave some.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file. Choose a new folder with --out.")
    if not out.exists() or (out / RECORD).exists():
        return
    is_foreign = any(not name.startswith(".") for name in scan_names(out))
    if is_foreign and not (out / RECORD).exists():  # another process may have written it by now
        raise ValueError(f"{out} holds other files; choose a new folder with --out.")


@contextlib.contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """Keep other generations out of a folder; a refused one leaves no new folder behind."""
    message = (
        f"Another process generates into {out}. Wait for it, or choose another folder with --out."
    )
    with contextlib.ExitStack() as stack:
        if not (out / RECORD).exists():
            stack.enter_context(leave_nothing_if_refused(out, [RECORD]))
        stack.enter_context(lock(out / LOCK, message))
        yield


def open_folder(out: Path, record: dict, state) -> dict | None:
    """Write the record into a new folder and remove what a kill left; return an earlier record."""
    before = ask_main_process(state, lambda: read_matching_record(out, record))
    if state.is_main_process:
        remove_remains(out)
        if before is None:
            write_atomically(out / RECORD, json.dumps(record, indent=2) + "\n")
    state.wait_for_everyone()
    return before


def read_matching_record(out: Path, record: dict) -> dict | None:
    """Return the folder's record; `ValueError` if its images are not of the same settings."""
    path = out / RECORD
    if not path.exists():
        return None
    try:
        before = json.loads(path.read_text())
        theirs = dict(before.get("settings", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged. Choose another folder with --out.") from error
    ours = record["settings"]
    changed = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if changed:
        raise ValueError(
            f"{out} holds images made with other settings ({', '.join(changed)} "
            f"{'differs' if len(changed) == 1 else 'differ'}). Choose another folder with --out."
        )
    return before
