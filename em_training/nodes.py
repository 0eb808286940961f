"""Several processes on several nodes: what must be common to them, and how they fail together.

Each of these functions is called by all processes; with one process, nothing is sent.
"""

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object

from em_data.files import LOCK, lock, make_folder
from em_training.config import MAY_CHANGE, changed_fields, find_marked

SECONDS_TO_SEE = 30.0  # a network disk may show a new file late
PROBE = ".seen-by-all-"
T = TypeVar("T")


class OtherProcessError(ValueError):
    """Another process failed and says why, so that this one need not."""

    def __init__(self) -> None:
        super().__init__("Another process failed; see its error.")


@contextlib.contextmanager
def fail_together(state: Any) -> Iterator[None]:
    """Raise in all processes if the block raises in one; it holds no exchange between them.

    The first process that failed raises its error, the others `OtherProcessError`.

    Args:
        state: accelerate's `Accelerator` or `PartialState`.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if state.num_processes == 1:
        failed = [] if error is None else [0]
    else:
        errors = gather_object([error is not None])
        failed = [rank for rank, has_error in enumerate(errors) if has_error]
    if not failed:
        return
    if error is None or failed[0] != state.process_index:
        raise OtherProcessError from error
    if state.process_index > 0 and isinstance(error, ValueError | OSError):
        raise ValueError(f"{name_process(state)}: {error}") from error
    raise error


def fill_cache(state: Any, work: Callable[[], T]) -> T:
    """Return `work()` of each process, after another one has filled the cache that it reads.

    First the main process works, then the first one of each other node, whose cache may be its own,
    then the others. An error in one of them is raised in all, as by `fail_together`.
    """
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    for now in range(3):
        with fail_together(state):
            if now == turn:
                result = work()
    return result


def ask_main_process(state: Any, question: Callable[[], T]) -> T:
    """Return `question()` as the main process answers it.

    What the processes do together must not depend on what each finds on a network disk.
    """
    with fail_together(state):
        answer = [question() if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(answer)  # into the list
    return cast(T, answer[0])


@contextlib.contextmanager
def lock_run(folder: str | Path, state: Any) -> Iterator[None]:
    """Keep other trainings out of `folder` for the block, and check that all processes see it.

    Raises:
        ValueError: Another training holds the folder, or a process sees another folder.
    """
    with contextlib.ExitStack() as held:
        with fail_together(state):
            held.enter_context(lock_folder(folder, is_main_process=state.is_main_process))
        check_common_folder(folder, state)
        yield


@contextlib.contextmanager
def lock_folder(folder: str | Path, *, is_main_process: bool = True) -> Iterator[None]:
    """Keep other trainings out of `folder` for the block; only the main process of several locks.

    Raises:
        ValueError: If another training holds the folder.
    """
    if not is_main_process:
        yield
        return
    message = (
        f"another process is training in {folder}; wait for it, or use another folder with --out"
    )
    with lock(Path(folder) / LOCK, message):
        yield


def check_common_folder(folder: str | Path, state: Any) -> None:
    """Refuse processes that do not see the same folder, as on nodes without a common disk.

    Raises:
        ValueError: The main process names those that do not see a file that it has written.
    """
    if state.num_processes == 1:
        return
    path = ask_main_process(state, lambda: _write_probe(Path(folder)))
    blind = gather_object([None if _sees(Path(folder) / path) else name_process(state)])
    blind = [name for name in blind if name is not None]
    with fail_together(state):
        if state.is_main_process:
            (Path(folder) / path).unlink()
            if blind:
                raise ValueError(
                    f"The nodes do not share the run folder {Path(folder).absolute()}: "
                    f"{_list(blind)} cannot see what the main process on {socket.gethostname()} "
                    "wrote there. Use a folder on a disk that all nodes share, with --out."
                )


def check_same_config(config: Any, state: Any) -> None:
    """Refuse processes that were started with other flags than the main one.

    Fields marked `MAY_CHANGE` may differ.

    Raises:
        ValueError: The first process that differs names what it has.
    """
    mains = ask_main_process(state, lambda: config)
    names = changed_fields(mains, config).keys() - find_marked(type(config), MAY_CHANGE)
    with fail_together(state):
        if names:
            name = min(names)
            mine, main = (_find(each, name) for each in (config, mains))
            raise ValueError(
                f"{name} is {mine!r}, but {main!r} in the main process. Start all nodes with the "
                "same command, on the same kind of device."
            )


def check_same_tiles(identity: dict[str, Any], state: Any) -> None:
    """Refuse processes that have other tiles than the main one.

    Args:
        identity: As of `em_data.Data.identity`.

    Raises:
        ValueError: The main process names those that differ.
    """
    if state.num_processes == 1:
        return
    everywhere = gather_object([(name_process(state), identity)])
    others = [name for name, each in everywhere if each != everywhere[0][1]]
    with fail_together(state):
        if others and state.is_main_process:
            raise ValueError(
                f"The nodes do not have the same tiles: those of {_list(others)} differ from those "
                f"of the main process on {socket.gethostname()}. Give --data a folder that all "
                "nodes share, or copy the same files to each node."
            )


def share_tensors(parts: dict[str, Any], state: Any) -> None:
    """Give all processes the main one's tensors: processors of two kinds may draw others.

    Args:
        parts: {name: object whose `state_dict` holds the tensors themselves}.
    """
    if state.num_processes == 1:
        return
    for part in parts.values():
        for tensor in _list_tensors(part.state_dict()):
            dense = tensor.detach().to(state.device).contiguous()
            torch.distributed.broadcast(dense, 0)
            with torch.no_grad():
                tensor.copy_(dense)


def name_process(state: Any) -> str:
    """Return what people call this process."""
    return f"process {state.process_index} on {socket.gethostname()}"


def _list(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _find(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _write_probe(folder: Path) -> str:
    """Write a file that nobody has looked for yet, and return its name."""
    make_folder(folder)
    for left in folder.glob(PROBE + "*"):  # by a start that was killed
        left.unlink(missing_ok=True)
    name = PROBE + secrets.token_hex(8)
    (folder / name).touch()
    return name


def _sees(path: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_SEE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        for parent in path.parents[:2]:  # listing a folder of a network disk reads it anew
            if parent.is_dir():
                list(parent.iterdir())
        time.sleep(0.2)
    return True


def _list_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _list_tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _list_tensors(each)
