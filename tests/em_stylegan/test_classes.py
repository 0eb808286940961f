"""Training with classes: the ramp, the means of w, resume, transfer, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from em_data import DataConfig, load_data
from em_data.batch import Batch
from em_stylegan import gan_loop
from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.em_style_mapping import MappingNetwork
from em_stylegan.game import Game, draw_ws, map_to_ws, update_w_means
from em_stylegan.losses import (
    discriminator_loss,
    find_class_weight,
    generator_loss,
    r1_penalty,
)
from em_stylegan.networks import create_networks
from em_stylegan.pictures import styles
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_stylegan.presets import PRESETS
from em_stylegan.train import train_gan
from em_stylegan.transfer import load_initial_weights
from em_training import create_accelerator, list_checkpoints, load_checkpoint, make_generator

TILES = DataConfig(
    resolution=32, downsample=4, num_synthetic=12, micrograph_size=256, held_out_fraction=0.5
)


def make_config(**changes):
    config = replace(PRESETS["test"](), data="synthetic-materials", conditional=True, tiles=TILES)
    return replace(config, save_untrained=False, **changes)


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return train_gan(replace(config, out=str(tmp_path_factory.mktemp("classes") / "run")))


def load_state(out):
    return load_checkpoint(list_checkpoints(out / "stylegan" / "checkpoints")[-1])["state"]


def test_the_ramp_is_linear():
    seen = (0, 100, 150, 175, 200, 10_000)
    assert [find_class_weight(n, (100, 200)) for n in seen] == [0, 0, 0.5, 0.75, 1, 1]
    assert find_class_weight(0, (0, 0)) == 1
    assert find_class_weight(99, (100, 100)) == 0


def make_game(config, tmp_path, seen):
    model, discriminator = create_networks(config, 3)
    torch.nn.init.normal_(discriminator.out_unconditional.weight)
    game = Game(config, model, discriminator, create_accelerator(tmp_path, "no"))
    game.start_step(seen)
    images = torch.rand(8, 1, 32, 32, generator=make_generator(0)) * 2 - 1
    return game, Batch(images, torch.arange(8), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))


@pytest.mark.parametrize(("seen", "weight"), [(0, 0.0), (24, 0.5), (40, 1.0)])
def test_losses_are_those_of_the_paper(config, tmp_path, seen, weight):
    """L = L_unconditional + lambda L_conditional, for both networks; R1 of the same sum."""
    game, batch = make_game(config, tmp_path, seen)
    out = game.backward_D(batch, 1.0)
    generated = game.generate(batch)
    game.discriminator.group_size = 2
    labels = batch.class_labels
    real, fake = (game.discriminator(x, labels) for x in (batch.images, generated.seen))
    expected = discriminator_loss(real[:, 0], fake[:, 0])
    expected += weight * discriminator_loss(real[:, 1], fake[:, 1])
    torch.testing.assert_close(out["loss_D"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        out["scores_real"], real[:, :1] + weight * real[:, 1:], rtol=1e-4, atol=1e-5
    )
    expected = generator_loss(fake[:, 0]) + weight * generator_loss(fake[:, 1])
    torch.testing.assert_close(game.backward_G(batch, 1.0)["loss_G"], expected)
    images = batch.images.clone().requires_grad_()
    scores = game.discriminator(images, labels)
    expected = r1_penalty(scores[:, 0] + weight * scores[:, 1], images).mean()
    parameter = game.discriminator.conv.weight
    scale = config.r1_gamma / 2 * config.training.r1_every_steps / (1 + weight)
    (gradient,) = torch.autograd.grad(expected * scale, parameter, retain_graph=True)
    before = parameter.grad.clone()
    torch.testing.assert_close(game.backward_penalty_D(batch, 1.0)["r1"], expected)
    torch.testing.assert_close(parameter.grad - before, gradient, rtol=1e-3, atol=1e-5)
    # before the ramp nothing flows into what knows classes
    embedding = game.model.mapping_network.embed.weight.grad
    assert (embedding.abs().max() > 0) == (weight > 0)
    assert (game.discriminator.class_mapping.embed.weight.grad.abs().max() > 0) == (weight > 0)


def test_without_weight_all_classes_are_one(config):
    model, _ = create_networks(config, 3)
    z = torch.randn(3, 8, generator=make_generator(0))
    labels = torch.arange(3)
    torch.testing.assert_close(map_to_ws(model, z, labels, 0.0), map_to_ws(model, z, [0] * 3, 0.0))
    assert torch.equal(map_to_ws(model, z, labels), model.mapping(z, labels))
    _, ws = draw_ws(model, 3, 1.0, make_generator(1), labels)
    _, other = draw_ws(model, 3, 1.0, make_generator(1), labels.flip(0))
    same = (ws == other).flatten(1).all(dim=1)
    assert same.tolist() == [False, True, False]  # both styles of an image are of its class


def test_means_of_w_of_each_class(tmp_path):
    mapping = MappingNetwork(4, 6, 2, num_classes=3, class_means=True)
    model = torch.nn.Module()
    model.mapping_network = mapping
    accelerator = create_accelerator(tmp_path, "no")
    rng = make_generator(0)
    for _ in range(2000):
        labels = torch.randint(2, (8,), generator=rng)  # class 2 never comes
        w = labels[:, None] * 3.0 + torch.randn(8, 6, generator=rng)
        update_w_means(model, w, labels, accelerator, 0.98)
    torch.testing.assert_close(
        mapping.class_w_means.mean(dim=1), torch.tensor([0.0, 3.0, 0.0]), atol=0.2, rtol=0
    )
    torch.testing.assert_close(mapping.w_mean.mean(), torch.tensor(1.5), atol=0.2, rtol=0)
    # a class that fills the batch moves as far as the mean of all does
    mapping.update_class_means(torch.full((3, 6), 6.0), torch.full((3,), 2.0), 0.9)
    moved = 0.1 * 3 + 0.9 * mapping.class_w_means.new_zeros(())
    torch.testing.assert_close(mapping.class_w_means[2].mean(), moved)


def test_truncation_keeps_to_the_class(config):
    model, _ = create_networks(config, 3)
    torch.nn.init.normal_(model.mapping_network.class_w_means)
    z, labels = torch.randn(2, 8, generator=make_generator(0)), torch.tensor([2, 0])
    means = model.mapping_network.class_w_means[labels]
    torch.testing.assert_close(model.mapping(z, labels, 0.0)[:, 3], means)
    ws = model.mapping(z, labels)
    torch.testing.assert_close(
        model.mapping(z, labels, 0.7), means[:, None].lerp(ws, 0.7), rtol=1e-5, atol=1e-6
    )
    pictures = styles.make_truncation(model.eval(), 0, 2, (0.0, 1.0), class_label=1)
    torch.testing.assert_close(pictures[0], pictures[2])  # both rows begin at the mean of class 1


def test_a_run_with_classes_becomes_a_pipeline_with_classes(finished):
    pipeline = EMStyleGANPipeline.from_pretrained(finished / "pipeline")
    assert pipeline.labels == {"coarse-loops": 0, "fine-loops": 1, "lines": 2}
    assert pipeline.generator.config.class_means
    rngs = [torch.Generator().manual_seed(i) for i in range(2)]
    images = pipeline(2, rngs, class_labels="lines", truncation_psi=0.5, output_type="pt").images
    assert images.shape == (2, 1, 32, 32)
    lines = (finished / "stylegan" / "stats.jsonl").read_text().splitlines()
    weights = [json.loads(line)["class_weight"] for line in lines]
    assert weights[0] == 0 < weights[-1] == 1
    assert pipeline.generator.mapping_network.class_w_means.abs().min(dim=1).values.max() > 0


@pytest.mark.parametrize("stop_at", [16, 24])
def test_resume_within_the_ramp_to_the_bit(config, finished, tmp_path, monkeypatch, stop_at):
    class MortalRun(gan_loop.TrainingRun):
        def step(self, num_images_seen):
            super().step(num_images_seen)
            if num_images_seen == stop_at:
                raise KeyboardInterrupt

    changed = replace(
        config, out=str(tmp_path), training=replace(config.training, checkpoint_every=8)
    )
    with monkeypatch.context() as patch:
        patch.setattr(gan_loop, "TrainingRun", MortalRun)
        with pytest.raises(KeyboardInterrupt):
            train_gan(changed)
    resumed, whole = load_state(train_gan(changed)), load_state(finished)
    for part in ("model", "discriminator", "ema"):
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), (part, name)


def test_the_best_weights_are_sought_after_the_ramp(config, tmp_path):
    training = replace(config.training, evaluate_every=8, num_evaluation_images=8, num_images=40)
    out = train_gan(replace(config, out=str(tmp_path), training=training))
    best = json.loads((out / "stylegan" / "best" / "best.json").read_text())
    assert best["num_images_seen"] >= 32


@pytest.mark.parametrize("architecture", ["stylegan3-t", "stylegan1"])
def test_other_architectures_and_plain_conditioning(config, tmp_path, architecture):
    """Without the ramp, as StyleGAN2-ADA trains; with adaptive augmentation."""
    training = replace(config.training, num_images=16, class_ramp_images=(0, 0))
    changed = replace(
        config,
        out=str(tmp_path),
        generator=replace(config.generator, architecture=architecture),
        discriminator=replace(config.discriminator, unconditional_output=False),
        training=replace(training, augmentation=replace(training.augmentation, mode="adaptive")),
    )
    pipeline = EMStyleGANPipeline.from_pretrained(train_gan(changed) / "pipeline")
    assert pipeline.num_classes == 3
    state = load_state(tmp_path)
    assert "out_unconditional.weight" not in state["discriminator"]


def test_the_relativistic_game_in_parts_of_a_batch(config, tmp_path):
    """Pairs of a real and a generated image are of one class."""
    training = replace(
        config.training, num_images=16, class_ramp_images=(0, 16), micro_batch_size=4,
        loss="relativistic", r1_every_steps=1, path_length_weight=0.0,
    )  # fmt: skip
    out = train_gan(replace(config, out=str(tmp_path), training=training))
    assert EMStyleGANPipeline.from_pretrained(out / "pipeline").num_classes == 3
    lines = (out / "stylegan" / "stats.jsonl").read_text().splitlines()
    assert {"r1", "r2", "class_weight"} <= json.loads(lines[0]).keys()


def test_training_with_classes_starts_from_a_model_without(config, tmp_path):
    """While the classes have no weight, both networks compute what those without classes do."""
    plain = replace(config, conditional=False, out=str(tmp_path / "plain"))
    training = replace(plain.training, num_images=16)
    train_gan(replace(plain, training=training))
    changed = replace(config, init_from=str(tmp_path / "plain"))
    model, discriminator = create_networks(changed, 3)
    weights = load_initial_weights(changed, model, discriminator, lambda text: None)
    model.load_state_dict(weights["ema"])
    discriminator.load_state_dict(weights["discriminator"])
    state = load_state(tmp_path / "plain")
    old, old_discriminator = create_networks(plain)
    old.load_state_dict(state["ema"])
    old_discriminator.load_state_dict(state["discriminator"])
    z, labels = torch.randn(4, 8, generator=make_generator(0)), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(map_to_ws(model, z, labels, 0.0), old.mapping(z))
    torch.testing.assert_close(model.mapping(z, labels, 0.0), old.mapping(z, None, 0.0))
    images = old(z, noise_mode="const")
    scores = discriminator(images, labels)
    torch.testing.assert_close(scores[:, :1], old_discriminator(images))
    assert scores[:, 1].abs().max() > 0
    out = train_gan(replace(changed, out=str(tmp_path / "new")))
    assert EMStyleGANPipeline.from_pretrained(out / "pipeline").num_classes == 3


def test_training_starts_from_a_run_with_the_same_classes(config, finished):
    changed = replace(config, init_from=str(finished))
    weights = load_initial_weights(changed, *create_networks(changed, 3), lambda text: None)
    assert torch.equal(
        weights["ema"]["mapping_network.class_w_means"],
        load_state(finished)["ema"]["mapping_network.class_w_means"],
    )
    with pytest.raises(ValueError, match=r"num_classes 3 \(ours 4\)"):
        load_initial_weights(changed, *create_networks(changed, 4))
    with pytest.raises(ValueError, match="too many"):
        load_initial_weights(changed, *create_networks(replace(changed, conditional=False)))


def test_an_official_discriminator_with_classes_gets_the_other_output(config):
    _, ours = create_networks(config, 3)
    official = StyleGANDiscriminator(32, channel_base=128, max_channels=8, num_classes=3)
    from em_stylegan.transfer import add_classes

    state = add_classes(official.state_dict(), ours.state_dict())
    assert state.keys() == ours.state_dict().keys()
    assert torch.equal(state["out.weight"], official.out.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_ramp_images": (32, 16)}, "class_ramp_images is 32 16"),
        ({"class_ramp_images": (0, 65)}, "--training.class-ramp-images 16 32"),
    ],
)
def test_impossible_ramps_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, training=replace(config.training, **changes))


def test_a_ramp_needs_the_unconditional_output(config):
    with pytest.raises(ValueError, match=r"Use --training\.class-ramp-images 0 0"):
        replace(config, discriminator=replace(config.discriminator, unconditional_output=False))
    plain = replace(config.discriminator, unconditional_output=False)
    replace(config, conditional=False, discriminator=plain)


def test_data_that_do_not_fit_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="there are no classes"):
        train_gan(replace(config, data="synthetic", out=str(tmp_path)))


def test_classes_that_are_not_used_are_said(config, tmp_path, capsys):
    training = replace(config.training, num_images=8)
    plain = replace(config, conditional=False, out=str(tmp_path), training=training)
    out = train_gan(plain)
    assert "3 classes (coarse-loops, fine-loops, lines)" in capsys.readouterr().out
    assert EMStyleGANPipeline.from_pretrained(out / "pipeline").num_classes == 0


def test_micrographs_without_a_class_are_refused(config):
    from em_stylegan.train import check_classes

    data = load_data(config.data, config.tiles, log=lambda text: None)
    check_classes(config, data)
    facts = data.train.cut.micrographs[data.train.micrograph_ids[0]]
    name, facts["class_name"] = facts["class_name"], None
    vars(data.train).pop("_classes", None)
    with pytest.raises(ValueError, match=f"1 micrographs have no class, such as {facts['name']}"):
        check_classes(config, data)
    facts["class_name"] = name
