"""What the root scripts share: a preset and flags from the command line, and errors as one clear line."""

import contextlib
import inspect
import io
import os
import sys
from collections.abc import Callable

import tyro
from pydantic import ValidationError

from em_training.config import describe_error
from em_training.precision import leave_processes
from em_training.run import NonFiniteLossError, TrainingInterrupted


def parse_preset(
    presets: dict[str, Callable], *, default: str, description: str, argv: list[str] | None = None
):
    """Return the configuration that the command line asks for: `PRESET --flags`, or `--flags` alone for the preset `default`.

    presets: name -> function that returns a frozen dataclass; its docstring is the preset's help text.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (
        argv[0] not in presets and argv[0] not in ("-h", "--help") and argv[0].startswith("-")
    ):
        print(
            f"preset '{default}' (none was named; there are {', '.join(presets)})", file=sys.stderr
        )
        argv = [default, *argv]
    configs = {
        name: (inspect.cleandoc(preset.__doc__ or ""), preset()) for name, preset in presets.items()
    }
    with _plain_errors():
        return tyro.extras.overridable_config_cli(configs, description=description, args=argv)


@contextlib.contextmanager
def _plain_errors():
    """Let a configuration's own error through, which tyro would print in a box of its own."""
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            yield
    except SystemExit as stop:
        error = stop
        while error is not None and not isinstance(error, ValidationError):
            error = error.__context__
        if error is not None:
            raise error from None
        sys.stderr.write(written.getvalue())
        raise


def run_command(main: Callable[[], None]) -> None:
    """Call `main`; a mistake of the user's ends as one line on stderr and exit code 2, a stop by signal as 130, a lost training as 1."""
    try:
        main()
        leave_processes()
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError) as error:
        if "EM_TRACEBACK" in os.environ:
            raise
        if isinstance(error, ValidationError):
            error = describe_error(error)
        print(f"error: {error}\n(EM_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)
