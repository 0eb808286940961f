import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file

from em_data import load_data
from em_diffusion import PRESETS, EMLatentDiffusionPipeline, LDMConfig, posthoc_ema, train_ldm
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.em_grain import EMGrain
from em_diffusion.grain import fit_grain
from em_diffusion.validation import choose_spaced_views
from em_training import config_from_json, config_to_json, lock_folder, seed_for
from em_training.weights import hash_weights
from support.commands import TORCHRUN
from support.config import refuses_config

ROOT = Path(__file__).parents[2]


def make_config(folder, **changes):
    config = PRESETS["test"]()
    tiles = dataclasses.replace(config.tiles, cache_dir=str(folder / "cache"))
    return dataclasses.replace(
        config, out=str(folder / "run"), tiles=tiles, precision="no", **changes
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the test preset: (its configuration, its folder)."""
    config = make_config(tmp_path_factory.mktemp("ldm"))
    return config, train_ldm(config)


def test_run_leaves_what_the_report_needs(run):
    config, out = run
    result = json.loads((out / "run.json").read_text())
    assert result["family"] == "ldm"
    assert result["num_images_seen"] == 64
    assert result["train_seconds"] == pytest.approx(sum(result["train_seconds_by_stage"].values()))
    assert config_from_json(LDMConfig, json.dumps(result["config"])) == config
    assert config_from_json(LDMConfig, (out / "config.json").read_text()) == config
    data = load_data(config.data, config.tiles, log=lambda text: None)
    assert result["data"] == data.summary
    for stage in ("autoencoder", "denoiser"):
        assert (out / stage / "stats.jsonl").exists()
        assert list((out / stage / "samples").glob("*.png"))


def test_pipeline_of_a_run_generates(run):
    _, out = run
    pipe = EMLatentDiffusionPipeline.from_pretrained(out / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        2, torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np"
    ).images
    assert images.shape == (2, 32, 32, 1)
    summary = json.loads((out / "run.json").read_text())["data"]
    assert pipe.config.pixel_size_nm == summary["pixel_size_nm"]
    assert not pipe.scheduler.config.get(
        "clip_sample", False
    )  # latents are not pixels; some samplers know no clipping


def test_latent_statistics_have_one_home(run):
    """What normalises the denoiser's latents is measured on the training side and stored with the
    autoencoder.
    """
    config, out = run
    data = load_data(config.data, config.tiles, log=lambda text: None)
    pipe = EMLatentDiffusionPipeline.from_pretrained(out / "pipeline")
    stage = VQModel.from_pretrained(out / "autoencoder" / "vqvae")
    assert stage.config.latents_mean == pipe.vqvae.config.latents_mean
    with torch.no_grad():
        latents = pipe.vqvae.encode(data.train.batch(range(data.train.num_views))).latents
    normalised = pipe.normalise_latents(latents)
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=2e-3)
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=2e-3)


def test_a_run_may_stop_after_its_autoencoder_and_go_on(run, tmp_path, capsys):
    config = dataclasses.replace(run[0], out=str(tmp_path / "run"))
    out = train_ldm(dataclasses.replace(config, last_stage="autoencoder"))
    assert "--last-stage denoiser continues" in capsys.readouterr().out
    assert (out / "autoencoder" / "vqvae").is_dir()
    assert not any(
        (out / name).exists() for name in ("latents", "denoiser", "pipeline", "run.json")
    )
    train_ldm(config)
    for path in (
        "vqvae/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    ):
        expected = load_file(run[1] / "pipeline" / path)
        for name, values in load_file(out / "pipeline" / path).items():
            assert torch.equal(values, expected[name]), name
    with refuses_config("last_stage is"):
        dataclasses.replace(config, last_stage="latents")


def test_second_start_trains_nothing(run, monkeypatch):
    config, out = run
    before = (out / "run.json").read_text()
    weights = (out / "pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes()

    def refuse(*args, **kwargs):
        raise AssertionError("a finished stage was trained again")

    monkeypatch.setattr("em_diffusion.train.train_autoencoder", refuse)
    monkeypatch.setattr("em_diffusion.train.train_denoiser", refuse)
    monkeypatch.setattr("em_training.latents.encode_views", refuse)
    monkeypatch.setattr("em_diffusion.train.save_model", refuse)
    train_ldm(config)
    assert (out / "run.json").read_text() == before
    assert (out / "pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_another_configuration_in_the_same_folder_is_refused(run):
    config, out = run
    other = dataclasses.replace(
        config, autoencoder=dataclasses.replace(config.autoencoder, learning_rate=0.5)
    )
    with pytest.raises(ValueError, match=r"autoencoder.learning_rate was 0.001, is now 0.5.*--out"):
        train_ldm(other)
    longer = dataclasses.replace(
        config, autoencoder=dataclasses.replace(config.autoencoder, num_images=128)
    )
    with pytest.raises(ValueError, match=r"autoencoder.num_images was 64, is now 128"):
        train_ldm(longer)
    assert config_from_json(LDMConfig, (out / "config.json").read_text()) == config


def test_a_finished_stage_with_cosine_decay_is_not_lengthened(run):
    """Its learning rate has come down to its end already."""
    config, _ = run
    with pytest.raises(
        ValueError, match=r"denoiser.num_images was 64, is now 80.*learning-rate-decay constant"
    ):
        train_ldm(
            dataclasses.replace(
                config, denoiser=dataclasses.replace(config.denoiser, num_images=80)
            )
        )


def test_a_lengthened_denoiser_is_the_longer_run(run, tmp_path):
    """With a learning rate that does not know the end: to the bit."""
    config, out = run
    for name in ("whole", "parts"):  # the finished autoencoder and its latents
        shutil.copytree(out, tmp_path / name, ignore=shutil.ignore_patterns("denoiser", "run.json"))
        (tmp_path / name / "config.json").unlink()
    denoiser = dataclasses.replace(config.denoiser, learning_rate_decay="constant", log_every=8)
    longer = dataclasses.replace(denoiser, num_images=80)
    train_ldm(dataclasses.replace(config, out=str(tmp_path / "parts"), denoiser=denoiser))
    for name in ("whole", "parts"):
        train_ldm(dataclasses.replace(config, out=str(tmp_path / name), denoiser=longer))
        assert json.loads((tmp_path / name / "run.json").read_text())["num_images_seen"] == 80
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (
        tmp_path / "parts" / weights
    ).read_bytes()


def test_a_second_training_in_the_folder_is_refused_at_once(run, monkeypatch):
    config, out = run
    monkeypatch.setattr(
        "em_diffusion.train.load_data",
        lambda *args, **kwargs: pytest.fail("the folder was not locked"),
    )
    with lock_folder(out), pytest.raises(ValueError, match="another process is training"):
        train_ldm(config)


def test_a_run_with_a_number_of_heads_ends_in_its_own_unet(run, tmp_path):
    config, out = run
    shutil.copytree(
        out, tmp_path / "run", ignore=shutil.ignore_patterns("denoiser", "run.json", "pipeline")
    )
    (tmp_path / "run/config.json").unlink()
    denoiser = dataclasses.replace(config.denoiser, num_attention_heads=2)
    out = train_ldm(dataclasses.replace(config, out=str(tmp_path / "run"), denoiser=denoiser))
    unet = EMLatentDiffusionPipeline.from_pretrained(out / "pipeline").unet
    assert type(unet).__name__ == "EMUNet2DModel"
    assert unet.config.num_attention_heads == 2
    assert (out / "pipeline/unet/em_unet2d_model.py").exists()


def test_the_pipeline_takes_the_best_weights(run, tmp_path, monkeypatch):
    config, out = run
    assert json.loads((out / "run.json").read_text())["denoiser_weights"] == {"of": "the last step"}
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("denoiser", "run.json"))
    (tmp_path / "run/config.json").unlink()
    denoiser = dataclasses.replace(config.denoiser, evaluate_every=16, num_evaluation_images=4)
    values = iter([7.0, 5.0, 6.0, 8.0])
    monkeypatch.setattr(
        "em_evaluation.held_out.HeldOutDistance.measure", lambda self, generate: next(values)
    )
    out = train_ldm(dataclasses.replace(config, out=str(tmp_path / "run"), denoiser=denoiser))
    result = json.loads((out / "run.json").read_text())
    assert result["num_images_seen"] == 64
    expected = {
        "of": "the best checkpoint",
        "num_images_seen": 32,
        "frechet_distance": 5.0,
        "num_images": 4,
    }
    measured_with = hash_weights(EMGrain.from_pretrained(out / "grain"))
    assert result["denoiser_weights"] == expected | {
        "num_inference_steps": 20,
        "grain_sha256": measured_with,
    }
    best, last, chosen = (
        load_file(out / folder / "unet/diffusion_pytorch_model.safetensors")
        for folder in ("denoiser/best", "denoiser", "pipeline")
    )
    assert all(torch.equal(chosen[name], best[name]) for name in best)
    assert not all(torch.equal(chosen[name], last[name]) for name in last)


def test_an_average_of_another_width_is_made_after_the_training(run, tmp_path, monkeypatch, capsys):
    config, out = run
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("denoiser", "run.json"))
    (tmp_path / "run/config.json").unlink()
    denoiser = dataclasses.replace(config.denoiser, posthoc_ema_every=16)
    train_ldm(dataclasses.replace(config, out=str(tmp_path / "run"), denoiser=denoiser))
    made, command = tmp_path / "made", ["posthoc_ema", str(tmp_path / "run"), "--sigma-rel", "0.1"]
    monkeypatch.setattr("sys.argv", [*command, "--num-images", "32", "--out", str(made)])
    posthoc_ema.main()
    assert "within 0.00%" in capsys.readouterr().err
    weights = EMLatentDiffusionPipeline.from_pretrained(made / "pipeline").unet.state_dict()
    assert EMLatentDiffusionPipeline.from_pretrained(made / "pipeline").grain is not None
    stored = load_file(tmp_path / "run/denoiser/posthoc_ema/000000000032-0.1.safetensors")
    assert weights.keys() == stored.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, stored[name].float(), rtol=1e-5, atol=1e-7)
    result = json.loads((made / "run.json").read_text())
    assert (result["name"], result["posthoc_ema"]["sigma_rel"]) == ("made", 0.1)
    assert result["num_images_seen"] == 32
    with pytest.raises(ValueError, match="is the run itself"):
        posthoc_ema.make_posthoc_pipeline(tmp_path / "run", 0.1, tmp_path / "run")
    with pytest.raises(ValueError, match="holds no training"):
        posthoc_ema.make_posthoc_pipeline(made, 0.1, tmp_path / "more")
    none = dataclasses.replace(config, out=str(tmp_path / "run"), denoiser=config.denoiser)
    with pytest.raises(ValueError, match="posthoc_ema_every was 16, is now 0"):
        train_ldm(none)


def test_held_out_tiles_are_never_trained_on(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    seen = []
    from em_diffusion import autoencoder_loop

    compute = autoencoder_loop.compute_losses

    def compute_and_record(model, perceptual, images, *rest):
        seen.append(images.clone())
        return compute(model, perceptual, images, *rest)

    monkeypatch.setattr(autoencoder_loop, "compute_losses", compute_and_record)
    train_ldm(config)
    data = load_data(config.data, config.tiles, log=lambda text: None)
    train = {image.numpy().tobytes() for image in data.train.batch(range(data.train.num_views))}
    held_out = {
        image.numpy().tobytes() for image in data.held_out.batch(range(data.held_out.num_views))
    }
    trained_on = {image.contiguous().numpy().tobytes() for batch in seen for image in batch}
    assert len(trained_on) > 32
    assert trained_on <= train
    assert not trained_on & held_out


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_round_trip(name):
    config = PRESETS[name]()
    assert config_from_json(LDMConfig, config_to_json(config)) == config
    for word in ("Hardware:", "Time:"):
        assert word in PRESETS[name].__doc__


def test_configurations_of_the_version_before_are_read():
    """`kind` was `family`, and `compile` had three values."""
    config = PRESETS["test"]()
    values = json.loads(config_to_json(config))
    values["autoencoder"]["family"] = values["autoencoder"].pop("kind")
    values["denoiser"]["compile"] = "auto"
    assert config_from_json(LDMConfig, json.dumps(values)) == config


def test_paper_preset_has_the_studys_sizes():
    from em_diffusion.autoencoder import create_autoencoder
    from em_diffusion.denoiser import create_denoiser

    config = PRESETS["paper"]()
    with torch.device("meta"):
        autoencoder = create_autoencoder(config.autoencoder, 256)
        unet = create_denoiser(config.denoiser, config.latent_size, 4)
    assert (config.latent_size, unet.config.sample_size) == (32, 32)
    assert autoencoder.quantize.embedding.weight.shape == (8192, 4)
    assert unet.down_blocks[1].attentions[0].heads == 8
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(475e6, rel=0.01)


@pytest.mark.parametrize("discriminator_weight", [0.0, 0.8])
def test_two_processes_train_one_model(tmp_path, discriminator_weight):
    """Two processes on half the batch each end where one process on the whole batch ends, but for
    noise and rounding.
    """
    config = make_config(tmp_path)
    recipe = {
        "discriminator_weight": discriminator_weight,
        "discriminator_channels": 8,
        "discriminator_layers": 1,
    }
    recipe |= (
        {"discriminator_start_images": 16, "ema_half_life_images": 8.0}
        if discriminator_weight
        else {}
    )
    config = dataclasses.replace(
        config, autoencoder=dataclasses.replace(config.autoencoder, **recipe)
    )
    program = tmp_path / "train.py"
    program.write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom em_diffusion import LDMConfig, "
        "train_ldm\n"
        "from em_training import config_from_json, leave_processes\ntorch.set_num_threads(1)\n"
        "train_ldm(config_from_json(LDMConfig, Path(sys.argv[1]).read_text()))\nleave_processes()\n"
    )
    (tmp_path / "config.json").write_text(config_to_json(config))
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*TORCHRUN, str(program), str(tmp_path / "config.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole = train_ldm(dataclasses.replace(config, out=str(tmp_path / "whole")))
    a, b = (
        EMLatentDiffusionPipeline.from_pretrained(folder / "pipeline").vqvae.state_dict()
        for folder in (whole, tmp_path / "run")
    )
    stage = dataclasses.replace(
        config.autoencoder, seed=seed_for(config.seed, config.autoencoder.seed)
    )
    torch.manual_seed(seed_for(stage.seed, "autoencoder"))
    start = create_autoencoder(stage, config.tiles.resolution).state_dict()
    names = [name for name in a if not name.startswith("quantize")]
    apart, moved = (
        torch.stack([(x[name] - y[name]).square().sum() for name in names]).sum().sqrt()
        for x, y in ((a, b), (a, start))
    )
    assert (
        apart < 0.1 * moved
    )  # half the batch each and no common gradient would bring them far apart
    result = json.loads((tmp_path / "run/run.json").read_text())
    assert result["num_images_seen"] == 64
    assert np.isfinite(result["train_seconds"])


def test_kl_run_from_micrographs_to_reconstructions(tmp_path):
    """Autoencoder by the full recipe, latents, denoiser, pipeline, and the floor of the report."""
    from em_diffusion.drawing import reconstruct

    config = make_config(tmp_path)
    recipe = {
        "kind": "kl",
        "discriminator_weight": 1.0,
        "discriminator_start_images": 32,
        "discriminator_channels": 8,
    }
    recipe |= {
        "discriminator_layers": 1,
        "ema_half_life_images": 8.0,
        "block_out_channels": (8, 16, 16),
    }  # f4
    out = train_ldm(
        dataclasses.replace(config, autoencoder=dataclasses.replace(config.autoencoder, **recipe))
    )
    pipe = EMLatentDiffusionPipeline.from_pretrained(out / "pipeline")
    assert isinstance(pipe.vqvae, AutoencoderKL)
    assert pipe.unet.config.sample_size == 8
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt"
    ).images
    assert images.shape == (2, 1, 32, 32)
    data = load_data(config.data, config.tiles, log=lambda text: None)
    held_out = data.held_out.batch(range(4))
    with torch.no_grad():
        latents = pipe.vqvae.encode(data.train.batch(range(data.train.num_views))).latent_dist.mean
        expected = pipe.vqvae.decode(pipe.vqvae.encode(held_out).latent_dist.mean).sample.clamp(
            -1, 1
        )
    normalised = pipe.normalise_latents(latents)
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=2e-3)
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=2e-3)
    torch.testing.assert_close(reconstruct(pipe.vqvae, held_out), expected)
    assert list((out / "denoiser/samples").glob("*.png"))


def test_grain_is_measured_on_training_views_and_may_be_left_out_later(run, tmp_path, capsys):
    from em_diffusion.drawing import reconstruct

    config, out = run
    pipe = EMLatentDiffusionPipeline.from_pretrained(out / "pipeline")
    data = load_data(config.data, config.tiles, log=lambda text: None)
    images = data.train.batch(choose_spaced_views(data.train, config.grain_images))
    expected = fit_grain(images, reconstruct(pipe.vqvae, images)).state_dict()
    for name, value in pipe.grain.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=1e-3)
    assert pipe.grain.deviations.mean() > 0.01
    shutil.copytree(out, tmp_path / "run")
    for grain_images in (0, 8):
        train_ldm(dataclasses.replace(config, out=str(tmp_path / "run"), grain_images=grain_images))
        again = EMLatentDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
        assert (again.grain is None) == (grain_images == 0)
        assert (tmp_path / "run" / "pipeline" / "grain").exists() == (grain_images > 0)
    assert not torch.equal(again.grain.amplitude, pipe.grain.amplitude)
    assert capsys.readouterr().out.count("grain: the autoencoder removes noise") == 1
    assert all(
        torch.equal(value, again.unet.state_dict()[name])
        for name, value in pipe.unet.state_dict().items()
    )
    with refuses_config("grain_images is -1"):
        dataclasses.replace(config, grain_images=-1)


def test_a_finished_runs_autoencoder_is_used_as_it_is(run, tmp_path, monkeypatch):
    """`init_from` with no images: the study's way, a pretrained autoencoder; a second start does
    not need it any more.
    """
    import shutil

    finished, source = run
    shutil.copytree(source, tmp_path / "source")
    config = make_config(tmp_path)
    tiles = dataclasses.replace(config.tiles, cache_dir=finished.tiles.cache_dir)
    autoencoder = dataclasses.replace(
        config.autoencoder, init_from=str(tmp_path / "source"), num_images=0
    )
    config = dataclasses.replace(config, autoencoder=autoencoder, tiles=tiles)
    out = train_ldm(config)
    result = json.loads((out / "run.json").read_text())
    assert result["num_images_seen_by_stage"] == {"autoencoder": 0, "denoiser": 64}
    assert result["train_seconds_by_stage"]["autoencoder"] == 0
    name = "pipeline/vqvae/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (source / name).read_bytes()
    a, b = (
        EMLatentDiffusionPipeline.from_pretrained(folder / "pipeline").vqvae.config
        for folder in (out, source)
    )
    assert a.latents_mean == pytest.approx(b.latents_mean)  # measured anew, on the same micrographs
    shutil.rmtree(tmp_path / "source")
    train_ldm(config)


def test_tiles_that_a_loaded_autoencoder_cannot_halve_are_refused_before_training(tmp_path):
    config = make_config(tmp_path)
    for width, message in (
        (16, r"makes latents of 1 x 1 of them, and the denoiser halves"),
        (8, "cannot encode"),
    ):
        f32 = dataclasses.replace(config.autoencoder, block_out_channels=(width,) * 6)
        create_autoencoder(f32, 32).save_pretrained(
            tmp_path / "source"
        )  # with 8 groups, 8 channels have no deviation
        autoencoder = dataclasses.replace(config.autoencoder, init_from=str(tmp_path / "source"))
        with pytest.raises(ValueError, match=message):
            train_ldm(
                dataclasses.replace(
                    config, out=str(tmp_path / f"run{width}"), autoencoder=autoencoder
                )
            )
    missing = dataclasses.replace(config.autoencoder, init_from=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        train_ldm(dataclasses.replace(config, out=str(tmp_path / "other"), autoencoder=missing))
