"""Several nodes: what they share is checked, and an error of one of them ends all."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.nodes import Nodes

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
# the command with less patience for a slow disk
COMMAND = """import sys
from em_training import nodes
nodes.SECONDS_TO_SEE = 0.5
from em_commands.train_gan import main
main()
"""


@pytest.fixture
def folders(tmp_path):
    """The folders of two nodes, each with micrographs of its own, and a program."""
    folders = [tmp_path / "first", tmp_path / "second"]
    rng = np.random.default_rng(0)
    for folder in folders:
        (folder / "data").mkdir(parents=True)
        (folder / "train.py").write_text(COMMAND)
        for name in "ab":
            image = rng.integers(0, 256, (64, 64), dtype=np.uint8)
            Image.fromarray(image).save(folder / "data" / f"{name}.png")
    return folders


def test_two_nodes_agree(folders, tmp_path):
    program = Path(__file__).with_name("two_nodes.py")
    shared = tmp_path / "shared"
    shared.mkdir()
    nodes = Nodes([[str(program), str(shared), str(folder)] for folder in folders], folders)
    assert nodes.wait(120) == [0, 0], "\n".join(nodes.texts)
    assert all(f"node {rank} is done" in text for rank, text in enumerate(nodes.texts))
    assert ["from the main process" in text for text in nodes.texts] == [True, False]


@pytest.mark.parametrize(
    ("out", "data", "message"),
    [
        pytest.param(
            *("run", "synthetic", "The nodes do not share the run folder"), marks=pytest.mark.slow
        ),
        ("{tmp}/run", "data", "The nodes do not have the same tiles"),
    ],
    ids=["folders", "tiles"],
)
def test_nodes_that_do_not_share_are_refused_with_one_sentence(
    folders, tmp_path, out, data, message
):
    words = ["train.py", "test", "--out", out.format(tmp=tmp_path), "--data", data]
    words += ["--tiles.downsample", "1", "--tiles.cache-dir", "cache"]
    nodes = Nodes([words, words], folders)
    assert 0 not in nodes.wait(120)
    errors = [
        line for text in nodes.texts for line in text.splitlines() if line.startswith("error:")
    ]
    assert len(errors) == 1, "\n".join(nodes.texts)
    assert message in errors[0]
    assert "process 1 on" in errors[0]
    assert not list(tmp_path.glob("**/checkpoints"))
