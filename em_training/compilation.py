"""`torch.compile` where it was found to be faster."""

import time

import torch
from accelerate.utils import broadcast

from em_training.memory import free_memory

NUM_WARMUP_STEPS, NUM_TIMED_STEPS = 2, 5
LEAST_GAIN = 1.03  # what is less than that may be chance
LARGEST_GAIN = 1.5  # to be hoped for, when deciding whether to try
COMPILE_SECONDS = 60  # that a try may cost


class Compilation:
    """Decides once whether `module` is compiled; `network` is what to call.

    choice: "on", "off", or "auto": measured at the start of the run on a GPU, and off on the CPU, where the demo's step became 8 %
    faster for minutes of compiling. run: the stage's `TrainingRun`, which says what was found. The decision is part of the checkpoint: a
    resumed run computes as it did before, and does not measure again. Where compiling does not work, the module runs as it is, and
    that is said.
    """

    def __init__(self, choice: str, module: torch.nn.Module, *, run):
        self.choice, self.module, self.run = choice, module, run
        self.network = module
        self.is_on: bool | None = {"on": True, "off": False, "auto": None}[choice]

    def decide(self, trial, num_steps: int) -> None:
        """Set `network` by the choice, what was decided before, or a measurement.

        trial: computes the gradients of a step by `network`, without exchange between processes, and drops them. num_steps: how many
        steps are left, of which the gain must pay for compiling.
        """
        is_measured = self.is_on is None and self.run.accelerator.device.type != "cpu"
        if is_measured:
            found = torch.tensor(
                [float(self._measure(trial, num_steps))], device=self.run.accelerator.device
            )
            self.is_on = bool(broadcast(found))  # the main process's, so that all round alike
        if self.is_on and self.network is self.module:
            self._compile(trial)
        if not self.is_on:
            self.is_on, self.network = False, self.module

    def _measure(self, trial, num_steps: int) -> bool:
        as_it_is = self._time(trial)
        if num_steps * as_it_is * (1 - 1 / LARGEST_GAIN) < COMPILE_SECONDS:
            self.run.say(
                f"{self.run.stage}: torch.compile is off: the {num_steps} steps left are too few to win back its time"
            )
            return False
        started = time.perf_counter()
        if not self._compile(trial):
            return False
        seconds = time.perf_counter() - started
        compiled = self._time(trial)
        gain = as_it_is / compiled
        is_faster = gain > LEAST_GAIN
        self.run.say(
            f"{self.run.stage}: torch.compile is {'on' if is_faster else 'off'}: a step takes {1000 * compiled:.0f} ms with it and "
            f"{1000 * as_it_is:.0f} ms without, {gain:.2f} times as fast, after {seconds:.0f} s of compiling"
        )
        return is_faster

    def _compile(self, trial) -> bool:
        """Compile now, by a first step; say so and leave `network` as it was where that fails."""
        self.network = torch.compile(self.module)
        try:
            trial()
            return True
        except (
            Exception
        ) as error:  # of any kind: a missing compiler, a version of a library, a lack of memory
            self.network = self.module
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        torch.compiler.reset()
        free_memory()
        self.run.say(
            f"{self.run.stage}: torch.compile does not work here, and the steps run without it ({text[:200]})",
            from_any_process=True,
        )
        return False

    def _time(self, trial) -> float:
        """Seconds of a step, the least of several."""
        for _ in range(NUM_WARMUP_STEPS):
            trial()
        seconds = []
        for _ in range(NUM_TIMED_STEPS):
            self._synchronize()
            started = time.perf_counter()
            trial()
            self._synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _synchronize(self) -> None:
        if self.run.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()

    def state_dict(self) -> dict:
        return {"choice": self.choice, "is_on": self.is_on}

    def load_state_dict(self, state: dict) -> None:
        if state["choice"] == self.choice:
            self.is_on = state["is_on"]
