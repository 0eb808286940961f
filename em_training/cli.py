"""What every command does: errors as one sentence, stops and closed pipes without a traceback."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from em_training.config import describe_error


def run_command(main: Callable[[], object]) -> None:
    """Call `main`, and turn what stops it into a sentence and an exit code.

    A user's mistake ends with code 2, a stop by a signal with 130, a diverged training with 1.
    Output that nobody reads any more (`| head`) is dropped, and the work goes on.
    """
    sys.stdout, sys.stderr = _IgnoreClosedPipe(sys.stdout), _IgnoreClosedPipe(sys.stderr)
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
    """End the process with one sentence, or let an error that is not the user's through."""
    kind = type(error).__name__
    if kind == "TrainingInterrupted":
        _fail(str(error), 130)
    if kind == "NonFiniteLossError":
        _fail(f"error: {error}", 1)
    if not isinstance(error, ValueError | OSError) and kind != "SafetensorError":
        raise error
    if "EM_TRACEBACK" in os.environ:
        raise error
    text = describe_error(error) if isinstance(error, ValidationError) else str(error)
    hint = "" if _is_expected(error) else "\n(EM_TRACEBACK=1 shows where)"
    _fail(f"error: {text}{hint}", 2)


def _is_expected(error: Exception) -> bool:
    """Say whether our own code raised the error on purpose, with a sentence for the user."""
    if isinstance(error, ValidationError):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(last.filename).parent.name.startswith("em_") or "/em_data/" in last.filename
    return is_ours and (last.line or "").startswith("raise ")


def _fail(text: str, code: int) -> None:
    print(text, file=sys.stderr)
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
