"""The distance during training, and the best weights on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from em_data.intensity import from_uint, to_uint8
from em_evaluation import frechet_distance, get_extractor, kernel_distance
from em_evaluation.held_out import HeldOutDistance
from em_training import BestWeights, read_best, save_best

ROOT = Path(__file__).parents[2]


def test_distance_is_that_of_the_evaluation(held_out, accelerator):
    """Of the images that are asked for, once each, after 8 bits, to all held-out views."""
    distance = HeldOutDistance(held_out, 6, seed=0, accelerator=accelerator)
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = []

    def generate(numbers):
        asked.extend(numbers)
        return images[list(numbers)]

    value = distance.measure(generate)
    assert asked == list(range(6))
    extractor = get_extractor(resolution=16)
    a, b = (extractor(from_uint(to_uint8(x))).numpy() for x in (images, held_out.images))
    assert value == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert distance.measure(lambda numbers: held_out.images[list(numbers)]) < 1e-3 * value


def test_further_metrics_stand_beside_the_distance(held_out, accelerator):
    said = []
    metrics = ("kernel_distance", "frechet_distance_infinite", "recall")
    distance = HeldOutDistance(
        held_out, 6, seed=0, accelerator=accelerator, metrics=metrics, say=said.append
    )
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    value = distance.measure(lambda numbers: images[list(numbers)])
    a, b = (distance.extractor(from_uint(to_uint8(x))).numpy() for x in (images, held_out.images))
    assert distance.further == pytest.approx(
        {
            "frechet_distance_infinite": distance.further["frechet_distance_infinite"],
            "kernel_distance": kernel_distance(a, b),
        },
        rel=1e-4,
    )
    assert distance.further["frechet_distance_infinite"] < value
    assert said == ["Not measured: Recall. They need 12 images of each set; there are 6."]
    for name in ("fid", "cmmd"):  # one that there is not, and one that wants CLIP's embeddings
        with pytest.raises(ValueError, match=f"^Unknown metrics during training: {name}"):
            HeldOutDistance(held_out, 6, seed=0, accelerator=accelerator, metrics=(name,))


def test_few_held_out_views_are_said_or_refused(held_out, accelerator):
    said = []
    assert (
        HeldOutDistance(held_out, 100, seed=0, accelerator=accelerator, say=said.append).num_images
        == 6
    )
    assert "over 6 images" in said[0]
    held_out.num_views = 1
    with pytest.raises(ValueError, match="set evaluate_every to 0"):
        HeldOutDistance(held_out, 100, seed=0, accelerator=accelerator)


class Model:
    def __init__(self, value):
        self.value = value

    def save_pretrained(self, folder):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(self.value))


class Killed(Exception):
    pass


def test_what_was_measured_otherwise_is_not_compared_with(tmp_path):
    """With grain and without are two measures: the first distance after a change is the best so
    far.
    """
    run = SimpleNamespace(dir=tmp_path, accelerator=SimpleNamespace(is_main_process=True))
    distance = SimpleNamespace(num_images=10, measure=lambda generate: generate())
    best = BestWeights(distance, run, "unet", grain_sha256=None)
    assert best.update(Model(1), lambda: 5.0, 16) == 5.0
    assert BestWeights(distance, run, "unet", grain_sha256=None).record["frechet_distance"] == 5.0
    best = BestWeights(distance, run, "unet", grain_sha256="abc")
    best.update(Model(2), lambda: 9.0, 32)
    assert read_best(tmp_path)["frechet_distance"] == 9.0
    best.update(Model(3), lambda: 9.5, 48)
    assert read_best(tmp_path)["num_images_seen"] == 32


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_leaves_the_old_best_or_the_new(tmp_path, monkeypatch, moment):
    """At every moment of the exchange the weights that are found belong to the record that is
    found.
    """
    save_best(Model(1), tmp_path, {"frechet_distance": 1.0}, "unet")
    calls = 0

    def kill_at_moment(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill_at_moment(os.replace))
        patch.setattr("shutil.rmtree", kill_at_moment(lambda path, ignore_errors: None))
        with pytest.raises(Killed):
            save_best(Model(2), tmp_path, {"frechet_distance": 2.0}, "unet")
    found = read_best(tmp_path)
    assert found["frechet_distance"] == float((tmp_path / "best/unet/weights").read_text())
    assert found["frechet_distance"] == (1.0 if moment < 4 else 2.0)
    save_best(Model(3), tmp_path, {"frechet_distance": 3.0}, "unet")
    assert (
        read_best(tmp_path)["frechet_distance"],
        (tmp_path / "best/unet/weights").read_text(),
    ) == (3.0, "3")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_there_is_no_best_without_a_record(tmp_path):
    assert read_best(tmp_path) is None
    (tmp_path / ".best-new/unet").mkdir(parents=True)
    (tmp_path / ".best-new/best.json").write_text('{"frechet')
    assert read_best(tmp_path) is None


def test_two_processes_measure_what_one_measures(tmp_path):
    """Shares of unequal size, weights that stay equal, one best: two_processes.py, against the same
    stage in one process.
    """
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    program = Path(__file__).with_name("two_processes.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, arguments in (("two", launch), ("one", [])):
        command = [sys.executable, *arguments, str(program), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    two, one = (
        json.loads((tmp_path / name / "measured.json").read_text()) for name in ("two", "one")
    )
    np.testing.assert_allclose(two["distance"], one["distance"], rtol=1e-4)
    assert two["best"] is not None
