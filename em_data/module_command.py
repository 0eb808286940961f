"""How a module of data or evaluation is run as a command; it cannot import `em_training.cli`."""

import sys
from collections.abc import Callable


def run_module(main: Callable[[], object], stopped: str = "stopped") -> None:
    """Call `main`; end with one sentence and code 2 for a mistake of the user, 130 for a stop."""
    try:
        main()
    except KeyboardInterrupt:
        end(stopped, 130)
    except (ValueError, OSError) as error:
        end(f"error: {error}", 2)


def end(text: str, code: int) -> None:
    """Print a last line and end the process."""
    print(text, file=sys.stderr)
    sys.exit(code)
