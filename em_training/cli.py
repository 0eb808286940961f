"""What every command does: errors as one sentence, stops and closed pipes without a traceback."""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from em_data.files import FullDiskError, is_full_disk, printable
from em_training.config import describe_error

LOST_CONNECTION = (
    "error: the connection to another process of this run is lost; it has ended or its node has "
    "failed. See its output. The same command goes on from the last checkpoint."
)
TOO_LARGE = (MemoryError, OverflowError, RecursionError)


def run_command(main: Callable[[], object]) -> None:
    """Call `main`, and turn what stops it into a sentence and an exit code.

    A user's mistake ends with code 2, a stop by a signal with 130, a diverged training or a fault
    of our own with 1. Output that nobody reads any more (`| head`) is dropped; the work goes on.
    """
    sys.stdout, sys.stderr = _IgnoreClosedPipe(sys.stdout), _IgnoreClosedPipe(sys.stderr)
    threading.excepthook = _report_of_thread
    try:
        main()
        if "torch" in sys.modules:
            from em_training.precision import leave_processes

            leave_processes()
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:
        _report(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = sys.stdout.stream, sys.stderr.stream


def _report(error: Exception) -> None:
    """End the process with one sentence, or with the traceback of an error that is our own."""
    kind = type(error).__name__
    if kind == "OtherProcessError":
        sys.exit(2)  # the other one says why
    if kind == "TrainingInterrupted":
        _fail(str(error), 130)
    if kind == "NonFiniteLossError":
        _fail(f"error: {error}", 1)
    if _is_lost_connection(error):
        if "EM_TRACEBACK" in os.environ:
            traceback.print_exception(error)
        _fail(LOST_CONNECTION, 1)
    text = _describe(error)
    if text is None or "EM_TRACEBACK" in os.environ:
        traceback.print_exception(error)
    if text is None:
        _fail("error: this is a fault in EM Synthesis. Please report it with the lines above.", 1)
    hint = "" if _is_expected(error) else "\n(EM_TRACEBACK=1 shows where)"
    _fail(f"error: {text}{hint}", 2)


def _describe(error: Exception) -> str | None:
    """Return what the user can do something about as a sentence; None for a fault of our own."""
    if isinstance(error, ValidationError):
        return describe_error(error)
    if is_full_disk(error) and not isinstance(error, FullDiskError):
        return str(FullDiskError(getattr(error, "filename", None) or "a file"))
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"There is no file or folder {error.filename}."
    if isinstance(error, ValueError | OSError) or type(error).__name__ == "SafetensorError":
        return str(error) or type(error).__name__
    if isinstance(error, TOO_LARGE) or _is_out_of_memory(error):
        reason = str(error).strip().split("\n")[0] or "the memory is full"
        return (
            f"This is too large for this machine or a number is too large ({reason}). Use smaller "
            "images, batches or networks, or fewer images."
        )
    if isinstance(error, ImportError):
        return f"{error}. A package is missing or too old; see Install in README.md."
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from em_training.memory import is_out_of_memory

    return is_out_of_memory(error)


def _is_lost_connection(error: Exception) -> bool:
    """Say whether an exchange between processes failed: Gloo and NCCL raise a `RuntimeError`."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _report_of_thread(arguments: threading.ExceptHookArgs) -> None:
    """Leave a full disk to the main thread, which meets it as well."""
    if arguments.exc_value is None or not is_full_disk(arguments.exc_value):
        threading.__excepthook__(arguments)


def _is_expected(error: Exception) -> bool:
    """Say whether our own code raised the error on purpose, with a sentence for the user."""
    if isinstance(error, ValidationError) or is_full_disk(error):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(last.filename).parent.name.startswith("em_") or "/em_data/" in last.filename
    return is_ours and (last.line or "").startswith("raise ")


def _fail(text: str, code: int) -> None:
    # names of files may hold control characters
    print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)
    sys.exit(code)


class _IgnoreClosedPipe:
    """A text stream that goes on without a reader."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
