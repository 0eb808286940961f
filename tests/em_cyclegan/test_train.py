"""The loop: resume to the bit, several processes, what it writes, what it refuses."""

import json
import math
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from em_cyclegan import losses, train, translation_loop
from em_cyclegan.config import CycleGANConfig, SourceTilesConfig
from em_cyclegan.pipeline_em_translation import EMTranslationPipeline
from em_cyclegan.presets import PRESETS
from em_cyclegan.train import train_cyclegan
from em_data import DataConfig
from em_training import (
    NonFiniteLossError,
    config_from_json,
    config_to_json,
    list_checkpoints,
    load_checkpoint,
    read_best,
    read_stats,
)
from support.commands import TORCHRUN
from support.config import refuses_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The test preset: 16 steps of 4 images, distance and checkpoints after 8 and 16."""
    config = PRESETS["test"]()
    training = replace(config.training, evaluate_every=32, num_evaluation_images=12)
    cache = str(tmp_path_factory.mktemp("cache"))
    return replace(
        config,
        precision="no",
        training=training,
        tiles=replace(config.tiles, cache_dir=cache),
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return train_cyclegan(replace(config, out=str(tmp_path_factory.mktemp("runs") / "whole")))


def flatten(tree, name=""):
    if isinstance(tree, dict):
        tree = tree.items()
    elif isinstance(tree, list | tuple):
        tree = enumerate(tree)
    else:
        return {name: tree}
    return {k: v for key, value in tree for k, v in flatten(value, f"{name}/{key}").items()}


def test_run_folder(finished, config):
    run = json.loads((finished / "run.json").read_text())
    assert run["family"] == "cyclegan"
    assert run["num_images_seen"] == 64
    assert run["train_seconds_by_stage"] == {"cyclegan": run["train_seconds"]}
    assert run["data"]["name"] == "synthetic-varied"
    assert run["source_data"]["name"] == "synthetic"
    written = config_from_json(CycleGANConfig, (finished / "config.json").read_text())
    assert written == replace(config, out=str(finished))
    assert len(list((finished / "cyclegan" / "samples").glob("*.png"))) == 2
    lines = read_stats(finished / "cyclegan")
    assert [line["num_images_seen"] for line in lines] == [16, 32, 48, 64]
    expected = {"loss_G", "loss_D", "loss_D_spectrum", "loss_cycle", "loss_identity"}
    expected |= {"gradient_norm_G", "gradient_norm_D"}
    assert all(expected <= set(line) for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    distances = {line["num_images_seen"]: line.get("held_out_frechet_distance") for line in lines}
    assert [value is not None for value in distances.values()] == [False, True, False, True]
    best = read_best(finished / "cyclegan")
    assert best["frechet_distance"] == min(distances[32], distances[64])
    before = lines[-1]["untranslated_frechet_distance"]
    assert lines[1]["untranslated_frechet_distance"] == before > 0
    assert run["generator_weights"] == {
        "of": "the best checkpoint",
        **best,
        "untranslated_frechet_distance": before,
    }


def test_pipeline_is_that_of_the_best_weights(finished):
    pipeline = EMTranslationPipeline.from_pretrained(finished / "pipeline")
    best = read_best(finished / "cyclegan")["num_images_seen"]
    saved = load_checkpoint(finished / "cyclegan" / "checkpoints" / f"{best:012d}")["state"]
    for direction in ("a_to_b", "b_to_a"):
        generator = getattr(pipeline, f"generator_{direction}")
        for name, value in generator.state_dict().items():
            assert torch.equal(value, saved["ema"][f"{direction}.{name}"])
    run = json.loads((finished / "run.json").read_text())
    assert pipeline.config.pixel_size_nm == run["source_data"]["pixel_size_nm"]


@pytest.mark.parametrize("steps_lost", [0, 2])
def test_resumed_run_equals_the_whole_run_to_the_bit(
    finished, config, tmp_path, monkeypatch, steps_lost
):
    """Stopped dead after 8 steps, or two steps past the checkpoint; then the same command again."""

    class Killed(BaseException):
        pass

    class MortalRun(translation_loop.TrainingRun):
        def step(self, num_images_seen):
            super().step(num_images_seen)
            if num_images_seen == 32 + 4 * steps_lost:
                raise Killed

    config = replace(config, out=str(tmp_path / "resumed"))
    with monkeypatch.context() as patch:
        patch.setattr(translation_loop, "TrainingRun", MortalRun)
        with pytest.raises(Killed):
            train_cyclegan(config)
    assert not (tmp_path / "resumed" / "run.json").exists()
    out = train_cyclegan(config)
    name = f"cyclegan/checkpoints/{64:012d}"
    whole, resumed = (
        flatten(load_checkpoint(folder / name)["state"]) for folder in (finished, out)
    )
    assert whole.keys() == resumed.keys()
    for part in ("generators", "discriminators", "ema", "optimizer", "optimizer_D", "pool_a"):
        assert any(key.startswith(f"/{part}/") for key in whole)
    for key, value in whole.items():
        is_tensor = isinstance(value, torch.Tensor)
        assert torch.equal(value, resumed[key]) if is_tensor else value == resumed[key], key
    assert whole["/pool_b/count"] == config.training.pool_size
    ignored = ("train_seconds", "images_per_second")
    lines = [
        [{k: v for k, v in line.items() if k not in ignored} for line in read_stats(o / "cyclegan")]
        for o in (finished, out)
    ]
    assert lines[0] == lines[1]
    assert read_best(finished / "cyclegan") == read_best(out / "cyclegan")
    kept = "cyclegan/best/generators/a_to_b/diffusion_pytorch_model.safetensors"
    assert (finished / kept).read_bytes() == (out / kept).read_bytes()


def test_contrastive_run(config, tmp_path):
    training = replace(
        config.training, method="contrastive", num_images=16, evaluate_every=0, spectrum_weight=0.0
    )
    out = train_cyclegan(replace(config, out=str(tmp_path / "cut"), training=training))
    run = json.loads((out / "run.json").read_text())
    assert run["family"] == "cut"
    assert run["generator_weights"] == {"of": "the last step"}
    (line,) = read_stats(out / "cyclegan")
    assert 0 < line["loss_contrastive"] < 2 * math.log(16)
    assert "loss_D_spectrum" not in line
    state = load_checkpoint(list_checkpoints(out / "cyclegan" / "checkpoints")[-1])["state"]
    assert "projection" in state
    assert "pool_a" not in state
    pipeline = EMTranslationPipeline.from_pretrained(out / "pipeline")
    assert pipeline.generator_b_to_a is None


def test_finished_run_is_not_trained_again(finished, config, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(train, "train_translation", refuse)
    assert train_cyclegan(replace(config, out=str(finished))) == finished
    assert "is already complete" in capsys.readouterr().out


def test_another_configuration_or_source_is_refused(finished, config):
    longer = replace(config.training, num_images=128)  # the learning rate would have been another
    with pytest.raises(ValueError, match=r"training\.num_images was 64, is now 128"):
        train_cyclegan(replace(config, out=str(finished), training=longer))
    with pytest.raises(ValueError, match=r"source was 'synthetic', is now 'synthetic-varied'"):
        train_cyclegan(replace(config, out=str(finished), source="synthetic-varied"))


def test_the_target_as_its_own_source_is_refused(config, tmp_path):
    same = replace(config, out=str(tmp_path), source=config.data)
    with pytest.raises(ValueError, match=r"the same tiles \(synthetic-varied\)"):
        train_cyclegan(same)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((0.5, 0.52), None), ((0.5, 0.7), "0.5 nm, one of the target 0.7 nm"), ((None, 1), "unknown")],
)
def test_other_pixel_sizes_are_said(sizes, said):
    sides = [{"fingerprint": str(i), "pixel_size_nm": size} for i, size in enumerate(sizes)]
    lines = []
    train.check_sources(*sides, lines.append)
    assert [said in line for line in lines] == ([] if said is None else [True])


def test_the_source_has_tiles_of_its_own():
    tiles = DataConfig(resolution=64, downsample=2, seed=3)
    own = SourceTilesConfig(downsample=1, num_synthetic=5)
    assert own.complete(tiles) == replace(tiles, downsample=1, num_synthetic=5)
    assert SourceTilesConfig().complete(tiles) == tiles


def test_stops_on_a_loss_that_is_not_finite(config, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "cycle_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(NonFiniteLossError, match="loss_cycle"):
        train_cyclegan(replace(config, out=str(tmp_path)))
    assert not list((tmp_path / "cyclegan" / "checkpoints").glob("*"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = PRESETS[name]()
    assert config_from_json(CycleGANConfig, config_to_json(config)) == config
    assert config.tiles.symmetries == "d4"
    assert config.training.cycle_weight == 10
    assert config.training.identity_weight == 0.5
    if name == "paper":
        assert config.training.pool_size == 50
        assert asdict(config.generator)["num_blocks"] is None
        assert config.discriminator.num_layers == 3


def test_impossible_configurations_are_refused():
    config = PRESETS["demo"]()
    for resolution, message in ((66, "multiple of 4"), (8, "at least 12 for discriminators of 2")):
        with pytest.raises(ValueError, match=message):
            replace(config, tiles=replace(config.tiles, resolution=resolution))
    with pytest.raises(ValueError, match=r"constant_images is 20000, but must be at most"):
        replace(config.training, constant_images=20_000)
    with refuses_config(r"training\.method"):
        replace(config.training, method="pix2pix")


def test_two_processes_share_the_work(config, tmp_path):
    """Both hold the same weights and pools, which are those of one process up to rounding."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("two_processes.py")
    result = subprocess.run(
        [*TORCHRUN, str(script), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=environment | {"PYTHONPATH": os.pathsep.join(["tests", "."])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    training = replace(config.training, num_images=32, num_evaluation_images=6)
    alone = train_cyclegan(replace(config, out=str(tmp_path / "alone"), training=training))
    state = load_checkpoint(list_checkpoints(alone / "cyclegan" / "checkpoints")[-1])["state"]
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, value in state["generators"].items():
        torch.testing.assert_close(together[name], value, rtol=0.05, atol=1e-3)
