"""Whole commands under power cuts, kills and full disks: the same command goes on to the same end.

`make test-faults` runs all of it; the fast tests take a few moments of one training.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.commands import Command, make_commands
from support.faults import Count, FullDisk, Kill, PowerCuts, replace_by
from support.tiny_bases import make_stable_diffusion

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a fork server")
TRAININGS = "train_ldm", "train_gan", "train_cyclegan", "train_lora"
NAMES = *TRAININGS, "generate", "evaluate"
KILLS = 50  # of each command
CUTS = 20


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The commands, and what they need: two trained models and the base of a LoRA."""
    models = tmp_path_factory.mktemp("models")
    made = make_commands(models)
    make_stable_diffusion(models / "base")
    for name in ("train_ldm", "train_gan"):
        assert made[name].run(models).code == 0
    return made


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """Return (results of an undisturbed call, number of its changes to files), once each."""
    known = {}

    def call(name):
        if name not in known:
            root = tmp_path_factory.mktemp(name)
            watcher = CountInFile(root, root.with_name(f"{root.name}.count"))
            done = commands[name].run(root, watcher)
            assert done.code == 0, done.text
            count = int(watcher.path.read_text())
            assert count > 20
            known[name] = commands[name].read_results(root), count
        return known[name]

    return call


class CountInFile(Count):
    """Counts in a file, for another process."""

    def __init__(self, root, path):
        super().__init__(root)
        self.path = path

    def before(self, kind, path):
        super().before(kind, path)
        self.path.write_text(str(self.count))


def assert_goes_on(command, root, results, what):
    """The same command ends as the undisturbed one."""
    done = command.run(root)
    assert done.code == 0, f"{what}: {done.text}"
    assert "Traceback" not in done.text
    found = command.read_results(root)
    different = [path for path in {**results, **found} if results.get(path) != found.get(path)]
    assert not different, f"{what}: {different}"


def starve(command, root, results, at):
    """A full disk from change number `at` on is one sentence with a path; then it goes on."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    done = command.run(root, FullDisk(root, at))
    last = done.text.splitlines()[-1]
    assert done.code == 2, f"change {at}: {done.text}"
    assert "Traceback" not in done.text, f"change {at}: {done.text}"
    assert str(root) in last, f"change {at}: {last}"
    assert "cannot be written" in last, f"change {at}: {last}"
    assert_goes_on(command, root, results, f"full disk at {at}")


def test_a_training_goes_on_after_a_full_disk(commands, whole, tmp_path):
    results, count = whole("train_gan")
    for at in random.Random(0).sample(range(1, count), 5):
        starve(commands["train_gan"], tmp_path / "root", results, at)


def test_a_training_goes_on_after_kills_while_it_writes(commands, whole, tmp_path):
    results, count = whole("train_gan")
    rng, root = random.Random(0), tmp_path / "root"
    root.mkdir()
    for _ in range(5):
        commands["train_gan"].run(root, Kill(root, rng.randint(1, count)))
    assert_goes_on(commands["train_gan"], root, results, "kills")


@pytest.mark.parametrize("name", NAMES)
def test_work_is_finished_when_nobody_reads_the_output(commands, whole, tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    assert commands[name].run(root, is_read=False).code == 0
    assert commands[name].read_results(root) == whole(name)[0]


@pytest.mark.parametrize("name", [*NAMES, "publish"])
def test_help_ends_well_when_nobody_reads_it(tmp_path, name):
    assert Command(name, ["--help"], ()).run(tmp_path / "root", is_read=False).code == 0
    done = Command(name, ["--help"], ()).run(tmp_path / "root")
    assert done.code == 0
    assert len(done.text.splitlines()) > 10


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_at_any_write_is_a_sentence_and_loses_nothing(commands, whole, tmp_path, name):
    results, count = whole(name)
    for at in sorted({1, 2, 3, *range(1, count, max(1, count // 40))}):
        starve(commands[name], tmp_path / "root", results, at)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_kills_at_random_moments_and_while_it_writes(commands, whole, tmp_path, name):
    """Half of them at a change to a file, half at a random moment."""
    results, count = whole(name)
    command, root = commands[name], tmp_path / "root"
    rng, kills, ends, started = random.Random(1), 0, 0, time.monotonic()
    root.mkdir()
    assert command.run(root).code == 0
    seconds = time.monotonic() - started
    while kills < KILLS:
        if kills % 2:
            code = command.run(root, Kill(root, rng.randint(1, count))).code
        else:
            process = command.start(root)
            time.sleep(rng.uniform(0, seconds))
            process.process.kill()
            code = process.wait().code
        kills += code == -9
        if code == 0:  # it came to its end in spite of them
            assert command.read_results(root) == results
            shutil.rmtree(root)
            root.mkdir()
            ends += 1
        assert code in (0, -9), command
    assert_goes_on(command, root, results, f"{kills} kills")
    print(f"{name}: {kills} kills, {ends + 1} ends, all equal to the undisturbed run")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_power_cuts_at_20_moments(commands, whole, tmp_path, name):
    """Each as the worst, the mildest and a random file system would leave the disk."""
    results, count = whole(name)
    command, root, states = commands[name], tmp_path / "root", tmp_path / "states"
    root.mkdir()
    every = max(1, count // CUTS)
    assert command.run(root, PowerCuts(root, states, every)).code == 0
    found = sorted(states.iterdir())
    assert len(found) >= 3 * CUTS
    for state in found:
        replace_by(root, state)
        assert_goes_on(command, root, results, state.name)
    print(f"{name}: {len(found)} of {len(found)} power cuts")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_copies_of_a_mounted_file_system_go_on(commands, whole, tmp_path, name):
    """20 copies of an ext4 image, taken while the command writes to it."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting an image needs root on Linux")
    results, _ = whole(name)
    command, image, root = commands[name], tmp_path / "disk.img", tmp_path / "root"
    copies = 0
    root.mkdir()
    while copies < CUTS:
        make_image(image)
        with Mount(image, root):
            process = command.start(root)
            while process.process.is_alive() and copies < CUTS:
                time.sleep(random.Random(copies).uniform(0.02, 0.2))
                if freeze(process.process.pid):
                    copies += 1
                    shutil.copyfile(image, tmp_path / f"copy-{copies}.img")
                    os.kill(process.process.pid, signal.SIGCONT)
            process.wait()
    for number in range(1, copies + 1):
        copy = tmp_path / f"copy-{number}.img"
        with Mount(copy, root):
            assert_goes_on(command, root, results, copy.name)
        copy.unlink()
    print(f"{name}: {copies} of {copies} copies of a file system")


def freeze(pid: int) -> bool:
    """Stop a process, so that a copy is of one moment; return whether it was still there."""
    state = ""
    while state not in ("T", "Z", "X"):
        try:
            os.kill(pid, signal.SIGSTOP)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
    return state == "T"


def make_image(path: Path) -> None:
    """Make an empty ext4 image of 100 MB that commits only when asked to."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)


class Mount:
    """An image mounted on a folder for the block; a copy's journal is replayed first."""

    def __init__(self, image: Path, folder: Path):
        self.image, self.folder = image, folder

    def __enter__(self):
        done = subprocess.run(
            ["mount", "-o", "loop,commit=300", self.image, self.folder],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no loop mounts here: {done.stderr.decode()}")
        shutil.rmtree(self.folder / "lost+found", ignore_errors=True)

    def __exit__(self, *raised):
        subprocess.run(["umount", self.folder], check=True)
