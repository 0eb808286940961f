import time
from types import SimpleNamespace

import pytest
import torch

from em_training import Compilation, create_accelerator


@pytest.fixture
def run(tmp_path):
    """A run on the CPU that passes for one on a GPU: what is measured is time."""
    lines = []
    accelerator = create_accelerator(tmp_path, "no")
    return SimpleNamespace(
        stage="toy",
        lines=lines,
        say=lambda text, from_any_process=False: lines.append(text),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), num_processes=accelerator.num_processes
        ),
    )


class Step:
    """Steps of a module that takes `seconds` as it is and `compiled_seconds` compiled, on a clock of their own."""

    def __init__(
        self,
        monkeypatch,
        run,
        choice="auto",
        seconds=1.0,
        compiled_seconds=0.5,
        error=None,
        is_gpu=True,
    ):
        self.now, self.num_compiled, self.error = 0.0, 0, error
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "compile", lambda module: ("compiled", module))
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
        self.seconds = {False: seconds, True: compiled_seconds}
        if is_gpu:
            monkeypatch.setattr(Compilation, "_synchronize", lambda self: None)
            run.accelerator.device = SimpleNamespace(type="cuda")
            monkeypatch.setattr(
                "em_training.compilation.torch.tensor", lambda value, device: value[0]
            )
            monkeypatch.setattr("em_training.compilation.broadcast", lambda value: value)
        self.module = torch.nn.Linear(1, 1)
        self.compilation = Compilation(choice, self.module, run=run)

    def __call__(self):
        is_compiled = self.compilation.network is not self.module
        if is_compiled:
            self.num_compiled += 1
            if self.error:
                raise self.error
        self.now += self.seconds[is_compiled]


def test_auto_takes_what_was_faster_and_says_both_times(monkeypatch, run):
    for compiled_seconds, is_on in ((0.5, True), (0.99, False), (2.0, False)):
        step = Step(monkeypatch, run, compiled_seconds=compiled_seconds)
        step.compilation.decide(step, 10_000)
        assert step.compilation.is_on is is_on
        assert (step.compilation.network is not step.module) is is_on
        assert step.num_compiled > 5
    assert (
        "torch.compile is on: a step takes 500 ms with it and 1000 ms without, 2.00 times as fast"
        in run.lines[0]
    )
    assert all("torch.compile is off" in line for line in run.lines[1:])


def test_auto_does_not_try_where_it_cannot_pay(monkeypatch, run):
    step = Step(monkeypatch, run)
    step.compilation.decide(step, 20)
    assert step.num_compiled == 0
    assert "20 steps left are too few" in run.lines[0]
    step = Step(monkeypatch, run, is_gpu=False)
    run.accelerator.device = torch.device("cpu")
    step.compilation.decide(step, 10**9)
    assert step.num_compiled == 0
    assert step.compilation.is_on is False
    assert step.now == 0


def test_on_and_off_are_obeyed_without_a_measurement(monkeypatch, run):
    for choice, count in (("on", 1), ("off", 0)):
        step = Step(monkeypatch, run, choice, compiled_seconds=9.0)
        step.compilation.decide(step, 1)
        assert step.num_compiled == count
        assert (step.compilation.network is not step.module) == (choice == "on")
    assert not run.lines


@pytest.mark.parametrize("choice", ["on", "auto"])
def test_without_a_compiler_the_run_goes_on_and_says_so_once(monkeypatch, run, choice):
    step = Step(
        monkeypatch,
        run,
        choice,
        error=RuntimeError("Failed to find C compiler.\nPlease install one"),
    )
    step.compilation.decide(step, 10_000)
    assert step.compilation.network is step.module
    (line,) = run.lines
    assert line.startswith("toy: torch.compile does not work here")
    assert "Failed to find C compiler" in line
    assert "Please" not in line


def test_a_resumed_run_does_not_measure_again(monkeypatch, run):
    step = Step(monkeypatch, run)
    step.compilation.decide(step, 10_000)
    resumed = Step(monkeypatch, run, compiled_seconds=9.0)
    resumed.compilation.load_state_dict(step.compilation.state_dict())
    resumed.compilation.decide(resumed, 10_000)
    assert resumed.num_compiled == 1
    assert resumed.compilation.is_on
    other = Step(monkeypatch, run, "off")
    other.compilation.load_state_dict(step.compilation.state_dict())
    other.compilation.decide(other, 10_000)
    assert other.compilation.network is other.module


def test_an_interruption_is_not_taken_for_a_missing_compiler(monkeypatch, run):
    step = Step(monkeypatch, run, "on", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        step.compilation.decide(step, 1)
