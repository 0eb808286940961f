"""Run the look from the command line."""

import sys

from em_data.look.command import run


def main():
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
