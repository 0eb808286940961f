"""Run the look from the command line."""

from em_data.look.command import run
from em_data.module_command import run_module

if __name__ == "__main__":
    run_module(run)
