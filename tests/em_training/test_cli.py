import pytest
import torch

from em_training.cli import run_command
from em_training.precision import leave_processes


def fail():
    raise ValueError("no such thing")


def test_a_command_leaves_its_group_of_processes_unless_it_failed(capsys):
    """Else a finished process may abort; and one that failed may wait for the others."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    with pytest.raises(SystemExit, match="2"):
        run_command(fail)
    assert "error: no such thing" in capsys.readouterr().err
    assert torch.distributed.is_initialized()
    run_command(lambda: None)
    assert not torch.distributed.is_initialized()
    leave_processes()  # alone there is nothing to leave
