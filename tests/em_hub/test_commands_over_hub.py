"""The commands as a user calls them, each in a process of its own, over a Hub: push, train,
publish, generate, judge, offline.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from em_data.labels import write_labelled
from em_data.synthetic_micrographs import synthesise_micrographs
from em_evaluation.wording import find_metric
from support.hub_server import HubServer, make_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # a dozen processes
ROOT = Path(__file__).parents[2]
TRAININGS = {"em-ldm": "train_ldm.py", "em-gan": "train_gan.py"}


class Machine:
    """A computer of ours with a cache and a token of its own: `run` calls a command in an empty
    folder of it.
    """

    def __init__(self, server, home, **changes):
        self.home = home
        home.mkdir(exist_ok=True)
        own = {
            "HF_TOKEN": "write-token",
            "XDG_CACHE_HOME": str(home / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        self.environment = make_environment(server, home / "hf", **own | changes)

    def run(self, *words, check=True, **changes):
        words = [ROOT / words[0] if str(words[0]).endswith(".py") else words[0], *words[1:]]
        result = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=self.home,
            env=self.environment | changes,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or result.returncode == 0, result.stderr[-3000:]
        return result


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def owner(server, tmp_path_factory):
    """A machine that has pushed micrographs and published both trainings on them, in private
    repositories, by commands alone.
    """
    owner = Machine(server, tmp_path_factory.mktemp("owner"))
    write_labelled(list(synthesise_micrographs(4, 0, 256)), owner.home / "micrographs")
    owner.run("-m", "em_data.push", "micrographs", "you/set", "--private")
    for name, script in TRAININGS.items():
        words = [
            "test",
            "--data",
            "hub:you/set",
            "--out",
            name,
            "--push-to-hub",
            f"you/{name}",
            "--private",
        ]
        result = owner.run(script, *words)
        assert f"{server.url}/you/{name} (commit" in result.stderr
    return owner


@pytest.fixture
def user(server, owner, tmp_path):
    """Another machine of the same person's, which has downloaded nothing yet."""
    return Machine(server, tmp_path / "user")


def read_images(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def test_both_trainings_publish_their_runs(server, owner):
    for name in TRAININGS:
        assert server.repos["models", f"you/{name}"].private
        files = server.files(f"you/{name}")
        assert {"README.md", "samples.png", "run.json", "model_index.json"} <= set(files)
        record = json.loads(server.read(f"you/{name}", "run.json"))
        assert record["config"]["data"] == "hub:you/set"
        assert record["num_images_seen"] > 0
        for path in owner.home.joinpath(name, "pipeline").rglob("*.safetensors"):
            there = server.read(
                f"you/{name}", path.relative_to(owner.home / name / "pipeline").as_posix()
            )
            assert there == path.read_bytes()


def test_a_training_on_a_stream_is_the_training_on_the_whole_set(owner, user):
    user.run("train_gan.py", "test", "--data", "hub-stream:you/set", "--out", "streamed")
    weights = "pipeline/generator/diffusion_pytorch_model.safetensors"
    assert (user.home / "streamed" / weights).read_bytes() == (
        owner.home / "em-gan" / weights
    ).read_bytes()
    assert not list((user.home / "hf").rglob("*.parquet"))


@pytest.mark.parametrize("name", TRAININGS)
def test_images_of_a_hub_id_then_offline_then_of_a_pinned_revision(server, owner, user, name):
    def generate(machine, model, out, **options):
        return machine.run(
            "generate.py", "--model", model, "--out", out, "--num-images", "3", **options
        )

    before = server.repos["models", f"you/{name}"].branches["main"]
    generate(owner, name, f"images of {name}")
    expected = read_images(owner.home / f"images of {name}")
    generate(user, f"you/{name}", "first")
    np.testing.assert_array_equal(read_images(user.home / "first"), expected)

    # the repository changes: its name means the new model, its commit the old one
    changed = ["em-gan/untrained"] if name == "em-gan" else ["em-ldm", "--num-samples", "2"]
    owner.run("publish.py", changed[0], f"you/{name}", *changed[1:])
    after = server.repos["models", f"you/{name}"].branches["main"]
    assert after != before
    num_requests = len(server.requests)
    generate(user, f"you/{name}", "offline", HF_HUB_OFFLINE="1")
    generate(user, f"you/{name}@{before}", "pinned and offline", HF_HUB_OFFLINE="1")
    assert len(server.requests) == num_requests
    for folder in ("offline", "pinned and offline"):
        np.testing.assert_array_equal(read_images(user.home / folder), expected)
    if name == "em-gan":
        generate(user, f"you/{name}", "new")
        assert not np.array_equal(read_images(user.home / "new"), expected)

    offline = {"HF_HUB_OFFLINE": "1", "check": False}
    shutil.rmtree(user.home / "hf")
    result = generate(user, f"you/{name}", "nothing", **offline)
    assert result.returncode == 2
    assert "HF_HUB_OFFLINE forbids the network" in result.stderr.splitlines()[0]
    stranger = generate(user, f"you/{name}", "nothing", check=False, HF_TOKEN="")
    assert stranger.returncode == 2
    assert "it is private and HF_TOKEN" in stranger.stderr.splitlines()[0]


def test_what_a_login_node_fetched_suffices_for_a_training_without_internet(server, owner, user):
    user.run("-m", "em_data.look", "hub:you/set")  # the two commands of docs/cluster.md
    user.run("-m", "huggingface_hub.cli.hf", "download", "you/em-gan")
    num_requests = len(server.requests)
    words = ["test", "--data", "hub:you/set", "--init-from", "you/em-gan", "--out", "offline"]
    user.run("train_gan.py", *words, HF_HUB_OFFLINE="1")
    assert len(server.requests) == num_requests
    assert (user.home / "offline" / "run.json").is_file()


def test_hub_ids_are_judged_at_a_revision_and_offline(server, owner, user):
    def judge(out, *models, **changes):
        words = ["--num-images", "8", "--no-microscopy", "--no-memorisation", "--levels", "real"]
        user.run("evaluate.py", "--models", *models, "--out", out, *words, **changes)
        return json.loads((user.home / out / "report.json").read_text())

    commits = {name: server.repos["models", f"you/{name}"].commits for name in TRAININGS}
    published = {
        name: next(sha for sha, (title, _) in known.items() if "Publish" in title)
        for name, known in commits.items()
    }
    pinned = [f"you/{name}@{commit}" for name, commit in published.items()]
    report = judge("judged", *pinned)
    assert [model["name"] for model in report["models"]] == ["LDM", "StyleGAN2"]
    assert (report["dataset"]["name"], report["dataset"]["num_micrographs"]) == ("set", 4)
    num_requests = len(server.requests)
    shutil.rmtree(user.home / "cache")  # tiles are cut again, from the set that was downloaded
    again = judge("judged offline", *pinned, HF_HUB_OFFLINE="1")
    assert len(server.requests) == num_requests
    for first, second in zip(report["models"], again["models"], strict=True):
        assert first["info"]["weights_sha256"] == second["info"]["weights_sha256"]
        assert find_metric(report, first["name"]) == find_metric(again, second["name"])
    # the numbers of a Hub id's report go into the card of its run
    owner.run("publish.py", "em-ldm", "you/em-ldm", "--evaluation", user.home / "judged")
    value = find_metric(report, "LDM")["value"]
    assert f"value: {value}" in server.read("you/em-ldm", "README.md").decode()
