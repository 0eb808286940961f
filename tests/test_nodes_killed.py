"""Trainings on two nodes that fail again and again end as the undisturbed one, byte by byte."""

import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest

from support.commands import ROOT, Command
from support.nodes import Nodes
from support.tiny_bases import make_stable_diffusion

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals"),
    pytest.mark.slow,
    pytest.mark.timeout(7200),
]
KILLS = 10  # of each command
WORDS = ["test", "--tiles.cache-dir", "{root}/cache", "--out", "{root}/run"]
RESULTS = "*/pipeline/*/*.safetensors", "*/*/stats.jsonl"
STARTED = "Device:"  # what a command says first


def start(command, root):
    """Start a command under two torchrun agents."""
    folders = [root / "first", root / "second"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    words = [str(ROOT / f"{command.name}.py"), *[each.format(root=root) for each in command.words]]
    return Nodes([words, words], folders, has_agents=True)


def wait_for_start(nodes, rank=0):
    while STARTED not in nodes.texts[rank] and nodes.processes[rank].poll() is None:
        time.sleep(0.02)


def disturb(nodes, kind, rank):
    """Let a node fail, its process alone, or ask a node to stop."""
    if kind == "node":
        nodes.fail_node(rank)
    elif kind == "process":
        nodes.kill_process(rank)
    else:
        nodes.processes[rank].send_signal(signal.SIGTERM)


@pytest.mark.parametrize("name", ["train_ldm", "train_gan", "train_cyclegan", "train_lora"])
def test_nodes_that_fail_at_random_moments_change_nothing(tmp_path, name):
    words = WORDS
    if name == "train_lora":
        pytest.importorskip("peft")
        words = [*words, "--base", str(make_stable_diffusion(tmp_path / "base"))]
    command = Command(name, words, RESULTS)
    nodes = start(command, tmp_path / "whole")
    wait_for_start(nodes)
    started = time.monotonic()
    assert nodes.wait() == [0, 0], "\n".join(nodes.texts)
    seconds = time.monotonic() - started
    whole = command.read_results(tmp_path / "whole")

    rng, root, kinds, num_finished = random.Random(0), tmp_path / "parts", Counter(), 0
    while kinds.total() < KILLS:
        nodes, rank = start(command, root), rng.randrange(2)
        kind = rng.choice(["node", "node", "process", "stop"])
        wait_for_start(nodes)
        time.sleep(rng.uniform(0, seconds))
        if all(process.poll() == 0 for process in nodes.processes):
            num_finished += 1  # too late for it: the next one begins anew
            assert command.read_results(root) == whole
            shutil.rmtree(root)
            continue
        disturb(nodes, kind, rank)
        codes = nodes.end()
        if codes == [0, 0]:
            continue  # it was past its last step
        kinds[kind] += 1
        texts = "\n".join(nodes.texts)
        assert "fault in EM Synthesis" not in texts, texts
    nodes = start(command, root)
    assert nodes.wait() == [0, 0], "\n".join(nodes.texts)
    assert command.read_results(root) == whole
    print(f"{name}: {dict(kinds)}, ended {num_finished + 1} times, equal each time")
