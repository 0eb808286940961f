"""The benchmark for a GPU, tried on the CPU: its parts, its budget, and how it bears failures."""

import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parents[2]


def read_figures(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("part", "stages"),
    [("gan", ["stylegan"]), ("ldm", ["autoencoder", "denoiser"])],
)
def test_every_stage_of_a_preset_is_timed(part, stages, tmp_path):
    gpu.main(["--worker", part, "--tiny", "--out", str(tmp_path / "figures.jsonl")])
    figures = read_figures(tmp_path / "figures.jsonl")
    assert [each["stage"] for each in figures] == stages
    for each in figures:
        assert each["preset"] == "test"
        assert each["computed_at_once"] == each["batch_size"] == 8
        assert each["seconds_per_kimg"] == pytest.approx(1000 / each["images_per_second"], rel=1e-3)
        assert each["seconds_per_step"] == pytest.approx(8 / each["images_per_second"], rel=1e-3)
        assert each["peak_memory_gib"] is None  # no GPU


def test_images_are_drawn_until_the_time_is_over(monkeypatch):
    figure = gpu.time_sampling("test", False, 12, 4, until=float("inf"))
    assert figure["num_images"] == 12
    assert figure["is_extrapolated"]
    assert figure["seconds_of_50000"] == pytest.approx(50_000 * figure["seconds"] / 12, rel=1e-3)
    monkeypatch.setattr(gpu, "SECONDS_OF_A_CHUNK", 0.1)
    figure = gpu.time_sampling("test", False, 10_000, 4, until=0)
    assert 4 <= figure["num_images"] < 10_000


def test_the_step_is_compared_with_the_plain_loop():
    figures = gpu.compare_steps("test", tiny=True)["figures"]
    assert [each["name"] for each in figures] == [
        "training step, images per second",
        "training step over the bare pass, seconds",
        "seconds of a step by part",
    ]


def test_a_figure_that_does_not_fit_is_recorded_and_the_next_is_measured(tmp_path, monkeypatch):
    measure_denoiser = gpu.measure_denoiser

    def fill_memory(*arguments):
        raise MemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "measure_autoencoder", fill_memory)
    monkeypatch.setattr(gpu, "measure_denoiser", lambda preset, steps: measure_denoiser(preset, 1))
    gpu.main(["--worker", "ldm", "--tiny", "--out", str(tmp_path / "figures.jsonl")])
    failed, fine = read_figures(tmp_path / "figures.jsonl")
    assert failed == {"preset": "test", "error": "MemoryError: CUDA out of memory"}
    assert fine["stage"] == "denoiser"


def test_time_left_goes_to_later_parts_and_results_are_kept_after_each(tmp_path, monkeypatch):
    out, clock, given = tmp_path / "gpu.json", [0.0], {}

    def run_worker(name, seconds, arguments):
        if given:  # the parts before are on disk
            assert list(json.loads(out.read_text())["parts"]) == list(given)
        given[name] = seconds
        clock[0] += {"gan": 300, "ldm": 10, "step": 600}[name]
        return {"state": "done", "figures": []}

    monkeypatch.setattr(gpu, "run_worker", run_worker)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    command = ["--tiny", "--budget-minutes", "10", "--out", str(out), "--parts"]
    gpu.main([*command, "gan", "ldm", "step", "sampling"])
    assert given == pytest.approx({"gan": 600 * 0.2 / 0.65, "ldm": 300 * 0.2 / 0.45, "step": 116})
    parts = json.loads(out.read_text())["parts"]
    assert [parts[name]["state"] for name in ("gan", "sampling")] == [
        "done",
        "not started: no time left",
    ]
    assert sum(gpu.PARTS.values()) == pytest.approx(1)


def test_a_worker_that_takes_too_long_or_dies_leaves_its_figures(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        'out.write_text(\'{"preset": "test"}\\n\')\n'
        "if '--tiny' in sys.argv: sys.exit('no such card')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    died = gpu.run_worker("gan", 30, gpu.parse_arguments(["--tiny"]))
    assert (died["state"], died["figures"]) == ("failed: no such card", [{"preset": "test"}])
    late = gpu.run_worker("gan", 3, gpu.parse_arguments([]))
    assert (late["state"], late["figures"]) == ("stopped: its time was over", [{"preset": "test"}])


def test_without_a_gpu_it_says_so():
    if gpu.torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.main([])


@pytest.mark.slow
def test_the_whole_command_in_tiny(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--budget-minutes", "9"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {name: each["state"] for name, each in result["parts"].items()} == dict.fromkeys(
        gpu.PARTS, "done"
    )
    assert all("error" not in f for each in result["parts"].values() for f in each["figures"])
    assert {"gpu", "driver", "cuda", "versions"} <= result["hardware"].keys()
    assert result["date"].startswith("20")
