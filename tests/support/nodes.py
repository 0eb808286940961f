"""Nodes on this machine, each with one process, started by torchrun or as `srun` starts them."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


class Nodes:
    """Started nodes; `words` of each are a program and its arguments, run in its folder.

    The outputs are in `folder`/node.log. With `has_agents`, torchrun starts the program, and a node
    is an agent and its process.
    """

    def __init__(
        self,
        words: Sequence[Sequence[str]],
        folders: Sequence[Path],
        *,
        has_agents: bool = False,
    ):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.logs, self.processes = [folder / "node.log" for folder in folders], []
        for rank, (folder, program) in enumerate(zip(folders, words)):
            command = [sys.executable, *program]
            if has_agents:
                agent = ["--nnodes", len(words), "--node-rank", rank, "--nproc-per-node", 1]
                agent += ["--master-addr", "127.0.0.1", "--master-port", port]
                command[1:1] = ["-m", "torch.distributed.run", *map(str, agent)]
            else:
                environment |= {"WORLD_SIZE": str(len(words)), "RANK": str(rank)}
                environment |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            with self.logs[rank].open("wb") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
                )

    def wait(self, seconds: float = 300) -> list[int]:
        """Wait for all to end and return their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [
                process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes
            ]
        except subprocess.TimeoutExpired:
            for rank in range(len(self.processes)):
                self.fail_node(rank)
            texts = "\n".join(text[-3000:] for text in self.texts)
            raise AssertionError(f"they did not end within {seconds} s:\n{texts}") from None

    def end(self, seconds: float = 120) -> list[int]:
        """Wait until the agents' processes have ended, and return the agents' exit codes.

        An agent that waits for one that has failed, as it does for five minutes, is ended.
        """
        deadline = time.monotonic() + seconds
        while any(map(self._list_processes, range(len(self.processes)))):
            if time.monotonic() > deadline:
                return self.wait(0)  # which says what they have printed
            time.sleep(0.1)
        time.sleep(5)
        for rank in range(len(self.processes)):
            self.fail_node(rank)
        return self.wait()

    @property
    def texts(self) -> list[str]:
        """What each has printed."""
        return [log.read_text(errors="replace") for log in self.logs]

    def fail_node(self, rank: int) -> None:
        """End the processes of a node at once."""
        processes = self._list_processes(rank)
        self.processes[rank].kill()
        self._kill(processes)

    def kill_process(self, rank: int) -> None:
        """End the process that the agent of a node has started, but not the agent."""
        self._kill(self._list_processes(rank))

    def _list_processes(self, rank):
        """Return what runs below the first process of a node."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.processes[rank].poll() is None:
                return psutil.Process(self.processes[rank].pid).children(recursive=True)
        return []

    def _kill(self, processes):
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
