import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from em_training import TrainingInterrupted
from em_training.cli import run_command
from em_training.nodes import OtherProcessError
from em_training.precision import leave_processes


def fail():
    raise ValueError("no such thing")


def lose_connection():
    raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")


def fail_after_another():
    raise OtherProcessError


def test_a_command_leaves_its_group_of_processes_unless_it_failed(capsys):
    """Else a finished process may abort; and one that failed may wait for the others."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    with pytest.raises(SystemExit, match="2"):
        run_command(fail)
    assert "error: no such thing" in capsys.readouterr().err
    assert torch.distributed.is_initialized()
    with pytest.raises(SystemExit, match="1"):
        run_command(lose_connection)
    assert "error: the connection to another process" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_command(fail_after_another)
    assert not capsys.readouterr().err
    run_command(lambda: None)
    assert not torch.distributed.is_initialized()
    leave_processes()  # alone there is nothing to leave


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_work_goes_on_when_nobody_reads_its_output(tmp_path, stream):
    code = (
        "import sys\nfrom pathlib import Path\nfrom em_training.cli import run_command\n"
        "def main():\n"
        f"    for i in range(20_000):\n        print('line', i, file=sys.{stream})\n"
        "    Path(sys.argv[1]).write_text('done')\n"
        "run_command(main)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "result")]
    process = subprocess.Popen(command, **{stream: subprocess.PIPE})
    reader = getattr(process, stream)
    assert reader.readline().strip() == b"line 0"
    reader.close()
    assert process.wait(60) == 0
    assert (tmp_path / "result").read_text() == "done"


def test_errors_end_as_a_sentence_and_a_code(capsys, tmp_path):
    class NonFiniteLossError(RuntimeError):
        pass

    for error, code, text in (
        (
            FileNotFoundError(2, "No such file", "x.tif"),
            2,
            "error: There is no file or folder x.tif.",
        ),
        (SafetensorError("file is damaged"), 2, "error: file is damaged"),
        (
            OSError(28, "No space left on device", "x.png"),
            2,
            "error: x.png cannot be written: No space left on device. What was saved before is",
        ),
        (MemoryError(), 2, "error: This is too large for this machine"),
        (OverflowError("int too large"), 2, "error: This is too large"),
        (RecursionError("maximum recursion depth"), 2, "error: This is too large"),
        (
            ImportError("No module named lpips"),
            2,
            "error: No module named lpips. A package is missing",
        ),
        (NonFiniteLossError("loss is not finite"), 1, "error: loss is not finite"),
        (ValueError("a\x1b[2J.tif\nis bad"), 2, "error: a\\x1b[2J.tif\nis bad"),
        (TrainingInterrupted("saved"), 130, "saved"),
        (KeyboardInterrupt(), 130, "stopped"),
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as stop:
            run_command(main)
        assert stop.value.code == code
        assert capsys.readouterr().err.startswith(text)

    with pytest.raises(SystemExit, match="1"):
        run_command(lambda: {}["a bug"])
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "KeyError: 'a bug'" in text
    assert text.splitlines()[-1].startswith("error: this is a fault in EM Synthesis. Please report")
