"""The loop: resume to the bit, several processes, what it writes, what it refuses."""

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from em_data import load_data
from em_data.batch import Batch
from em_stylegan import game, gan_loop, networks
from em_stylegan.config import AugmentationConfig, StyleGANConfig
from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.losses import generator_loss
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_stylegan.presets import PRESETS
from em_stylegan.train import train_gan
from em_training import (
    MicroBatching,
    NonFiniteLossError,
    config_from_json,
    config_to_json,
    create_accelerator,
    list_checkpoints,
    load_checkpoint,
    make_generator,
    read_best,
    read_stats,
    step_optimizer,
)
from support.commands import TORCHRUN
from support.config import refuses_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The test preset: 8 steps of 8 images, R1 in every 4th, path length in every 2nd, distance,
    checkpoints after 4 and 8.
    """
    config = PRESETS["test"]()
    training = replace(
        config.training,
        evaluate_every=32,
        num_evaluation_images=12,
        evaluation_metrics=("recall",),
    )
    return replace(
        config,
        precision="no",
        training=training,
        tiles=replace(config.tiles, cache_dir=str(tmp_path_factory.mktemp("cache"))),
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return train_gan(replace(config, out=str(tmp_path_factory.mktemp("runs") / "whole")))


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
    assert run["family"] == "stylegan2"
    assert run["num_images_seen"] == 64
    assert run["train_seconds"] > 0
    assert run["train_seconds_by_stage"] == {"stylegan": run["train_seconds"]}
    assert run["data"]["num_micrographs"] == config.tiles.num_synthetic == 4
    written = config_from_json(StyleGANConfig, (finished / "config.json").read_text())
    assert written == replace(config, out=str(finished))
    assert len(list((finished / "stylegan" / "samples").glob("*.png"))) == 2
    lines = read_stats(finished / "stylegan")
    assert [line["num_images_seen"] for line in lines] == [16, 32, 48, 64]
    expected = {
        "loss_G",
        "loss_D",
        "scores_real",
        "scores_fake",
        "path_length",
        "gradient_norm_G",
        "gradient_norm_D",
    }
    assert all(expected <= set(line) for line in lines)
    distances = {line["num_images_seen"]: line.get("held_out_frechet_distance") for line in lines}
    assert [value is not None for value in distances.values()] == [False, True, False, True]
    assert ["held_out_recall" in line for line in lines] == [False, True, False, True]
    best = read_best(finished / "stylegan")
    assert (
        best["frechet_distance"]
        == min(distances[32], distances[64])
        == distances[best["num_images_seen"]]
    )
    assert run["generator_weights"] == {"of": "the best checkpoint", **best}
    assert list((finished / "tensorboard").rglob("events.out.tfevents.*"))
    assert ["r1" in line for line in lines] == [True, False, True, False]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_pipelines_before_and_after(finished, config):
    trained, untrained = (
        EMStyleGANPipeline.from_pretrained(finished / name) for name in ("pipeline", "untrained")
    )
    first, _ = networks.create_networks(config)
    for a, b in zip(untrained.generator.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)
    best = read_best(finished / "stylegan")
    saved = load_checkpoint(
        finished / "stylegan" / "checkpoints" / f"{best['num_images_seen']:012d}"
    )["state"]["ema"]
    for name, value in trained.generator.state_dict().items():
        assert torch.equal(value, saved[name])
    images = [
        pipe(2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for pipe in (trained, untrained)
    ]
    assert (images[0] - images[1]).abs().max() > 0.01
    assert trained.config.pixel_size_nm == untrained.config.pixel_size_nm


@pytest.mark.parametrize("steps_lost", [0, 2])
def test_resumed_run_equals_the_whole_run_to_the_bit(
    finished, config, tmp_path, monkeypatch, steps_lost
):
    """Stopped dead after 4 steps, or two steps past the checkpoint at 4; then the same command
    again.
    """

    class Killed(BaseException):
        pass

    class MortalRun(gan_loop.TrainingRun):
        def step(self, num_images_seen):
            super().step(num_images_seen)
            if num_images_seen == 32 + 8 * steps_lost:
                raise Killed

    config = replace(config, out=str(tmp_path / "resumed"))
    with monkeypatch.context() as patch:
        patch.setattr(gan_loop, "TrainingRun", MortalRun)
        with pytest.raises(Killed):
            train_gan(config)
    assert not (tmp_path / "resumed" / "run.json").exists()
    out = train_gan(config)
    name = f"stylegan/checkpoints/{64:012d}"
    whole, resumed = (
        flatten(load_checkpoint(folder / name)["state"]) for folder in (finished, out)
    )
    assert whole.keys() == resumed.keys()
    for part in ("model", "discriminator", "ema", "optimizer", "optimizer_D", "path_length_mean"):
        assert any(key.startswith(f"/{part}/") for key in whole)
    for key, value in whole.items():
        same = (
            torch.equal(value, resumed[key])
            if isinstance(value, torch.Tensor)
            else value == resumed[key]
        )
        assert same, key
    ignored = ("train_seconds", "images_per_second")
    lines = [
        [{k: v for k, v in line.items() if k not in ignored} for line in read_stats(o / "stylegan")]
        for o in (finished, out)
    ]
    assert lines[0] == lines[1]
    assert read_best(finished / "stylegan") == read_best(out / "stylegan")
    kept = "stylegan/best/generator/diffusion_pytorch_model.safetensors"
    assert (finished / kept).read_bytes() == (out / kept).read_bytes()


def test_measured_images_have_noise_of_their_own(config):
    """Where noise places the structures, one noise for all images would put them at the same places
    in each.
    """
    generator = networks.create_networks(config)[0].eval()
    for name, parameter in generator.named_parameters():
        if name.endswith("style.weight"):
            torch.nn.init.zeros_(parameter)  # z has no say
        elif name.endswith("noise_strength"):
            torch.nn.init.ones_(parameter)
    images = gan_loop.generate_images(generator, config, range(20))
    assert images.flatten(1).std(dim=0).min() > 0.1 * images.std()
    torch.testing.assert_close(
        gan_loop.generate_images(generator, config, [9, 17]), images[[9, 17]], rtol=1e-4, atol=1e-5
    )
    z = torch.randn(2, config.generator.z_dim)
    first, second = generator(z, noise_mode="const").detach()
    torch.testing.assert_close(first, second)


def test_without_evaluation_the_last_weights_are_kept(config, tmp_path):
    training = replace(config.training, evaluate_every=0, num_images=8)
    out = train_gan(replace(config, out=str(tmp_path / "run"), training=training))
    assert json.loads((out / "run.json").read_text())["generator_weights"] == {
        "of": "the last step"
    }
    assert not (out / "stylegan" / "best").exists()


def test_relativistic_training(config, tmp_path):
    training = replace(
        config.training, loss="relativistic", r1_every_steps=1, num_images=16, evaluate_every=0
    )
    (line,) = read_stats(
        train_gan(replace(config, out=str(tmp_path / "run"), training=training)) / "stylegan"
    )
    assert line["r1"] > 0
    assert line["r2"] > 0
    assert abs(line["loss_D"] - math.log(2)) < 0.3  # a pair begins undecided
    with refuses_config(r"training\.loss"):
        replace(training, loss="hinge")


def test_state_that_resume_must_carry_has_moved(finished):
    state = load_checkpoint(finished / "stylegan" / "checkpoints" / f"{64:012d}")["state"]
    assert state["path_length_mean"]["mean"] > 0
    assert state["model"]["mapping_network.w_mean"].abs().max() > 0
    assert not torch.equal(
        state["model"]["synthesis_network.blocks.0.const"],
        state["ema"]["synthesis_network.blocks.0.const"],
    )


def test_finished_run_is_not_trained_again(finished, config, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(game, "discriminator_loss", refuse)
    path = finished / "pipeline" / "generator" / "diffusion_pytorch_model.safetensors"
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    assert train_gan(replace(config, out=str(finished))) == finished
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == written
    assert "is already complete" in capsys.readouterr().out


def test_another_configuration_in_the_same_folder_is_refused(finished, config):
    other = replace(config, out=str(finished), training=replace(config.training, batch_size=16))
    with pytest.raises(ValueError, match=r"training\.batch_size was 8, is now 16"):
        train_gan(other)


def test_parts_of_a_batch_give_the_gradients_of_the_whole(config, tmp_path, monkeypatch):
    """Without minibatch deviation, noise and mixing, which mix or differ by the part."""
    changed = replace(
        config,
        discriminator=replace(config.discriminator, group_size=1),
        training=replace(config.training, style_mixing_probability=0.0),
    )
    model, discriminator = networks.create_networks(changed)
    accelerator = create_accelerator(tmp_path, "no")
    images = torch.rand(8, 1, 32, 32, generator=make_generator(0)) * 2 - 1
    batch = Batch(images, torch.arange(8))
    z = torch.randn(8, config.generator.z_dim, generator=make_generator(1))

    class KnownGame(game.Game):
        def generate(self, part, update_magnitudes=False):
            rows = slice(part.first_row, part.first_row + len(part))
            ws = model.mapping(z[rows])
            images = model.synthesis(ws, "const")
            return game.Generated(ws[:, 0], images, images, part.images)

    known = KnownGame(changed, model, discriminator, accelerator)
    results = []
    for size in (8, 3):
        gradients = []
        for name in ("D", "penalty_D", "G"):
            known.start_step(0)
            micro_batching = MicroBatching(size, run=None, flag="")
            parameters = known.parameters if name == "G" else known.parameters_D
            outputs = micro_batching.accumulate(
                getattr(known, f"backward_{name}"), batch, parameters
            )
            gradients += [p.grad for p in parameters if p.grad is not None]
            for parameter in [*known.parameters, *known.parameters_D]:
                parameter.grad = None
        results.append([outputs["loss_G"], *gradients])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_training_in_parts_resumes_and_replays_what_was_judged(config, tmp_path, monkeypatch):
    """The generator's turn sees the images that the discriminator's turn has judged."""
    training = replace(config.training, micro_batch_size=4, num_images=16, evaluate_every=0)
    seen, generate = {}, game.Game.generate

    def spy(self, part, update_magnitudes=False):
        generated = generate(self, part, update_magnitudes)
        seen.setdefault((self.num_images_seen, part.first_row), []).append(generated.seen.detach())
        return generated

    monkeypatch.setattr(game.Game, "generate", spy)
    out = train_gan(replace(config, out=str(tmp_path / "run"), training=training))
    assert set(seen) == {(0, 0), (0, 4), (8, 0), (8, 4)}
    for first, second in seen.values():
        assert torch.equal(first, second)
    assert not torch.equal(seen[0, 0][0], seen[0, 4][0])
    state = load_checkpoint(list_checkpoints(out / "stylegan" / "checkpoints")[-1])["state"]
    assert state["micro_batching"] == {"configured": 4, "size": 4}


def test_batch_that_groups_do_not_divide_is_refused(config, tmp_path):
    training = replace(config.training, batch_size=9)
    with pytest.raises(ValueError, match="multiple of 2"):
        train_gan(replace(config, out=str(tmp_path), training=training))
    assert not (tmp_path / "config.json").exists()


def test_stops_on_a_loss_that_is_not_finite(config, tmp_path, monkeypatch):
    monkeypatch.setattr(game, "generator_loss", lambda scores: scores.mean() * float("nan"))
    with pytest.raises(NonFiniteLossError, match="loss_G"):
        train_gan(replace(config, out=str(tmp_path)))
    assert not (tmp_path / "run.json").exists()
    assert not list((tmp_path / "stylegan" / "checkpoints").glob("*"))


def test_two_processes_share_the_work(tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    script = str(Path(__file__).with_name("two_processes.py"))
    command = [*TORCHRUN, script, str(tmp_path)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "agreed at 64" in result.stdout


def test_lazy_regularisation_leaves_the_optimiser_its_pace():
    """lr and betas to the power c = k / (k + 1), so that k + 1 steps move as k plain ones do (2020,
    appendix B).
    """
    optimizer = networks.create_optimizer(torch.nn.Linear(1, 1), 0.0025, 16)
    options = optimizer.param_groups[0]
    assert options["lr"] * 17 == pytest.approx(0.0025 * 16)
    assert options["betas"][0] == 0
    assert options["betas"][1] ** 17 == pytest.approx(0.99**16)
    assert (
        networks.create_optimizer(torch.nn.Linear(1, 1), 0.0025, 0).param_groups[0]["lr"] == 0.0025
    )


def test_style_mixing_changes_w_once_a_picture_at_the_stated_rate(config):
    model, _ = networks.create_networks(config)
    w, ws = game.draw_ws(model, 2000, 0.9, make_generator(0))
    first = (ws == w.unsqueeze(1)).all(dim=2)  # [B, num_ws]: layers that still have the first w
    assert first[:, 0].all()
    assert (first[:, 1:] <= first[:, :-1]).all(), "once changed, it stays changed"
    assert (~first[:, -1]).float().mean().item() == pytest.approx(0.9, abs=0.03)
    _, pure = game.draw_ws(model, 8, 0.0, make_generator(0))
    assert torch.equal(pure, pure[:, :1].expand_as(pure))


@pytest.mark.parametrize(
    "network", ["discriminator", "stylegan1", "stylegan2", "stylegan3-t", "stylegan3-r"]
)
@pytest.mark.parametrize("penalty", [False, True], ids=["main", "penalty"])
def test_an_update_goes_down_the_gradient(config, tmp_path, network, penalty):
    """Adam's first step without momentum moves each weight by the learning rate against the sign of
    its gradient. Convolutions leave gradients in another layout than that of the weights, which the
    fused Adam would not notice."""
    architecture = "stylegan2" if network == "discriminator" else network
    changed = replace(config, generator=replace(config.generator, architecture=architecture))
    model, discriminator = networks.create_networks(changed)
    images = torch.rand(4, 1, 32, 32, generator=make_generator(0)) * 2 - 1
    trained = discriminator if network == "discriminator" else model

    def compute_loss():
        if network == "discriminator":
            if penalty:
                return game.compute_gradient_penalty(discriminator, images, lambda images: images)
            return generator_loss(discriminator(images))
        if penalty:
            return game.compute_path_lengths(model, 4, 0.0, make_generator(1)).square().mean()
        _, ws = game.draw_ws(model, 4, 0.0, make_generator(1))
        return generator_loss(discriminator(model.synthesis(ws, "random", make_generator(2))))

    named = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(compute_loss(), list(named.values()), allow_unused=True)
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = networks.create_optimizer(trained, 0.01, 0)
    accelerator = create_accelerator(tmp_path, "no")
    accelerator.backward(compute_loss(), inputs=list(named.values()))
    step_optimizer(accelerator, optimizer, named.values())
    compared = 0
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        if gradient is not None and (large := gradient.abs() > 1e-5).any():
            step = before[name] - parameter.detach()
            torch.testing.assert_close(
                step[large], 0.01 * gradient[large].sign(), rtol=0.01, atol=1e-5, msg=name
            )
            compared += parameter.dim() == 4 and parameter.shape[2] > 1
    assert compared >= 3 or network == "stylegan3-r"  # whose kernels are 1 x 1


@pytest.fixture
def judged(monkeypatch):
    """What the discriminator was asked for: (type of the maps, images, batches in one pass)."""
    seen, forward = set(), StyleGANDiscriminator.forward

    def spy(self, image, **options):
        seen.add((options.get("compute_dtype"), len(image), options.get("num_batches", 1)))
        return forward(self, image, **options)

    monkeypatch.setattr(StyleGANDiscriminator, "forward", spy)
    return seen


class TestFloat16:
    """The scaler of the loss on the CPU, with float32 maps (a scale of a power of two changes no
    bit unless something overflows) and with float16 ones."""

    @pytest.fixture
    def run(self, config, tmp_path):
        data = load_data(config.data, config.tiles, log=lambda text: None).train

        def train(name, num_images=64, precision="no", **scaler_options):
            accelerator = create_accelerator(tmp_path, "no")
            accelerator.scaler = (
                torch.amp.GradScaler("cpu", **scaler_options) if scaler_options else None
            )
            changed = replace(
                config,
                precision=precision,
                training=replace(config.training, num_images=num_images, evaluate_every=0),
            )
            gan_loop.train_stylegan(changed, data, accelerator=accelerator, out_dir=tmp_path / name)
            folder = tmp_path / name / "stylegan"
            return load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])[
                "state"
            ], read_stats(folder)

        return train

    def test_scaled_is_unscaled(self, run):
        plain, plain_lines = run("plain")
        scaled, scaled_lines = run("scaled", init_scale=2.0**14, growth_interval=11)
        for part in ("model", "discriminator", "ema"):
            assert all(
                torch.equal(plain[part][name], value) for name, value in scaled[part].items()
            )
        # 8 steps of two updates, R1 in every 4th, path length in every 2nd: 22 updates, so two
        # growths
        assert scaled["scaler"]["scale"] == 2.0**16
        assert scaled_lines[-1]["skipped_steps_G"] == scaled_lines[-1]["skipped_steps_D"] == 0
        assert plain_lines[-1]["gradient_norm_D"] == scaled_lines[-1]["gradient_norm_D"] > 0
        assert "scaler" not in plain

    def test_overflow_skips_steps_and_resumes_to_the_bit(self, run, monkeypatch):
        """A loss of about 16 overflows at the first scale, and again when the scale has grown."""
        monkeypatch.setattr(game, "generator_loss", lambda scores: 16 * generator_loss(scores))
        options = {
            "init_scale": 2.0**127,
            "growth_interval": 8,
            "backoff_factor": 0.125,
            "growth_factor": 8.0,
        }
        whole, lines = run("whole", **options)
        run("parts", num_images=32, **options)
        parts, _ = run("parts", **options)
        assert [line["skipped_steps_G"] > 0 for line in lines] == [True, False, True, False]
        assert not any(line["skipped_steps_D"] for line in lines)
        assert whole["optimizer_D"]["state"][0]["step"] == 8 + 2  # with two of R1
        assert (
            whole["optimizer"]["state"][0]["step"] < 8 + 4
        )  # with four of path length, but for those skipped
        for part in ("model", "discriminator", "ema", "scaler"):
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(parts[part][k]))
                for k, v in whole[part].items()
            )

    def test_float16_maps(self, run, judged, monkeypatch):
        monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
        state, lines = run("half", precision="fp16", init_scale=2.0**10)
        assert judged == {(torch.float16, 16, 2), (torch.float16, 8, 1), (None, 8, 1)}
        assert lines[-1]["skipped_steps_G"] == lines[-1]["skipped_steps_D"] == 0
        full, full_lines = run("full")
        assert lines[0]["loss_D"] == pytest.approx(full_lines[0]["loss_D"], rel=1e-2)
        change = max(
            (state["model"][name] - value).abs().max() for name, value in full["model"].items()
        )
        assert 0 < change < 0.1

    def test_networks_are_bounded(self, config):
        generator, discriminator = networks.create_networks(replace(config, precision="fp16"))
        assert generator.config.clamp == discriminator.config.clamp == 256
        assert (
            generator.config.num_reduced_resolutions
            == discriminator.config.num_reduced_resolutions
            == 4
        )
        own = replace(config.generator, clamp=64.0, num_reduced_resolutions=2)
        generator, _ = networks.create_networks(replace(config, precision="fp16", generator=own))
        assert (generator.config.clamp, generator.config.num_reduced_resolutions) == (64.0, 2)
        with refuses_config("stylegan1 has no bound"):
            replace(
                config,
                precision="fp16",
                generator=replace(config.generator, architecture="stylegan1"),
            )
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            train_gan(replace(config, precision="fp16"))


def test_accelerator_precision_decides_the_type_of_the_maps(config, tmp_path, judged):
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # one process has one precision; this test needs another
    data = load_data(config.data, config.tiles, log=lambda text: None)
    short = replace(config, training=replace(config.training, num_images=8, evaluate_every=0))
    gan_loop.train_stylegan(
        short, data.train, accelerator=create_accelerator(tmp_path, "bf16"), out_dir=tmp_path
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    # real and generated images, each with deviations of their own; generated ones; R1 in float32
    assert judged == {(torch.bfloat16, 16, 2), (torch.bfloat16, 8, 1), (None, 8, 1)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = PRESETS[name]()
    assert config_from_json(StyleGANConfig, config_to_json(config)) == config
    doc = PRESETS[name].__doc__
    assert "Hardware:" in doc
    assert "Time:" in doc


def test_paper_preset_is_the_studys_best_gan():
    config = PRESETS["paper"]()
    with torch.device("meta"):
        generator, _ = networks.create_networks(config)
    assert generator.config.mapping_depth == 4
    assert [block.conv1.weight.shape[0] for block in generator.synthesis_network.blocks] == [
        1024
    ] * 4 + [512, 256, 128]
    assert config.training.num_images == 1_200_000
    assert config.r1_gamma == pytest.approx(0.4096)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"style_mixing_probability": 1.5},
        {"log_every": 0},
        {"checkpoint_every": 0},
        {"r1_gamma": -1.0},
    ],
)
def test_impossible_training_is_refused(change):
    with refuses_config(f"training.{next(iter(change))} is"):
        replace(PRESETS["test"]().training, **change)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("generator", {"z_dim": 0}),
        ("generator", {"mapping_depth": 0}),
        ("generator", {"max_channels": 0}),
        ("generator", {"channel_base": 16}),
        ("discriminator", {"channel_base": 16}),
        ("discriminator", {"group_size": -2}),
        ("discriminator", {"architecture": "dense"}),
    ],
)
def test_impossible_networks_are_refused(config, part, change):
    with refuses_config(f"{part}.{next(iter(change))} is"):
        replace(config, **{part: replace(getattr(config, part), **change)})


def test_impossible_target_of_augmentation_is_refused():
    with refuses_config("training.augmentation.target is 5, but must be less than 1"):
        AugmentationConfig(target=5)
