"""Weights to start from: another run's, or an official checkpoint's that was converted."""

import math
from copy import deepcopy
from pathlib import Path

import torch

from em_stylegan.config import StyleGANConfig
from em_stylegan.discriminator import StyleGANDiscriminator
from em_stylegan.networks import create_networks, fill_scale
from em_training import list_checkpoints, load_checkpoint, load_config
from em_training.saved_models import check_model
from em_training.sources import TRAINED_FURTHER, fetch_pipeline_folder, write_starts

SIZES = ("mapping_depth", "z_dim", "w_dim", "channel_base", "max_channels")
# options in which networks with the same weights may differ
FREE_OPTIONS = {
    *SIZES,
    "image_channels",
    "group_size",
    "clamp",
    "num_reduced_resolutions",
    "magnitude_decay",
    "class_mapping_depth",
    "class_mapping_width",
    "noise_strength",
    "class_means",
    "unconditional_output",
}


def start_from(config, model, discriminator, average, say=print, out=None):
    """Load the weights of `config.init_from` into the networks and the generator's average.

    out: The run's folder, which gets a record of them; None for none.
    """
    weights = load_initial_weights(config, model, discriminator, say)
    if out is not None:
        found = {"generator": "ema", "discriminator": "discriminator"}
        parts = {part: {"use": TRAINED_FURTHER} for part in found if weights[found[part]]}
        write_starts(out, config.init_from, parts)
    for network, name in ((model, "model"), (average, "ema"), (discriminator, "discriminator")):
        if weights[name] is not None:
            network.load_state_dict(weights[name])


def load_initial_weights(config, model, discriminator, say=print) -> dict:
    """Load the weights of `config.init_from` for these networks.

    `init_from` is a run's folder (its last checkpoint is used), a folder with G_ema, G and D
    written by `python -m em_stylegan.load_official`, or a saved pipeline: a folder, a model of the
    package, or a Hub id. A missing G is replaced by G_ema; without D, or a discriminator beside the
    pipeline's generator, the discriminator starts at random. Weights for three image channels are
    converted to one: the generator's image is the mean of the three, and the discriminator sees a
    grey image as one with three equal channels. Networks with classes may start from networks
    without: while the weight of the classes is 0, they compute the same.

    Returns:
        {"model", "ema", "discriminator"}: state dictionaries, or None for no discriminator.

    Raises:
        ValueError: If there are no such weights, or they are those of networks of another size.
    """
    folder = Path(config.init_from)
    found, note = find_networks(config.init_from, type(model))
    weights: dict = {name: None for name in found}
    problems = []
    for name, ours, kind, to_grey in (
        ("model", model, "generator", _generator_to_grey),
        ("ema", model, "generator", _generator_to_grey),
        ("discriminator", discriminator, "discriminator", _discriminator_to_grey),
    ):
        if found[name] is not None:
            state = _fit(found[name].state_dict(), ours, to_grey)
            weights[name] = add_classes(state, ours.state_dict())
            if name != "model":  # it has the shapes of its average
                problems += _compare(weights[name], ours, kind)
                problems += _compare_options(found[name].config, ours.config, kind)
    if problems:
        raise ValueError(
            f"init_from {folder} has other networks than this run: {'; '.join(problems)}. "
            f"Train with its sizes: {_list_flags(found['ema'], found['discriminator'])}"
        )
    say(f"starting from the weights of {folder}{note}")
    if weights["discriminator"] is None:
        say(f"{folder} has no discriminator (D): it starts at random")
    return weights


def find_networks(source, generator_type):
    """Return {"model", "ema", "discriminator"} of a value of `init_from`, and what to say of it."""
    folder = Path(source)
    if (folder / "stylegan" / "checkpoints").is_dir():
        return load_run_networks(folder, generator_type)
    if any((folder / name / "config.json").is_file() for name in ("G_ema", "G")):
        return _load_converted(folder, generator_type), ""
    return _load_pipeline(source, generator_type), ""


def adopt_scale(config):
    """Return `config` with what is None of image_mean and image_std as `init_from` has it."""
    generator = config.generator
    if None not in (generator.image_mean, generator.image_std):
        return config
    found, _ = find_networks(config.init_from, type(create_networks(config)[0]))
    return fill_scale(config, found["ema"].config)


def load_run_networks(folder, generator_type):
    """Return the networks of a run's last checkpoint, and what to say of it."""
    paths = list_checkpoints(folder / "stylegan" / "checkpoints")
    if not paths:
        raise ValueError(
            f"The run in {folder} has no checkpoint yet to start from. Let it train on, or give "
            "another --init-from."
        )
    saved = load_checkpoint(paths[-1])
    embedding = saved["state"]["model"].get("mapping_network.embed.weight")  # [w_dim, classes]
    model, discriminator = create_networks(
        load_config(StyleGANConfig, folder / "config.json"),
        0 if embedding is None else embedding.shape[1],
    )
    _check_type(folder, type(model).__name__, generator_type)
    found = {"model": model, "ema": deepcopy(model), "discriminator": discriminator}
    for name, network in found.items():
        network.load_state_dict(saved["state"][name])
    return found, f" at {saved['num_images_seen']:,} images"


def _load_converted(folder, generator_type):
    """Return the networks of a folder that `load_official` has written."""
    average, model = (_load(folder / name, generator_type) for name in ("G_ema", "G"))
    discriminator = _load(folder / "D", StyleGANDiscriminator)
    return {"model": model or average, "ema": average or model, "discriminator": discriminator}


def _load_pipeline(source, generator_type):
    """Return the networks of a saved pipeline: its generator, and a discriminator beside it."""
    path = Path(source)
    if path.is_dir() and not any(
        (folder / "model_index.json").is_file() for folder in (path, path / "pipeline")
    ):
        raise ValueError(
            f"init_from {source} is neither the folder of a run (with stylegan/checkpoints) nor a "
            "saved pipeline, nor a folder with G_ema, G or D, written by `python -m "
            "em_stylegan.load_official IN.pkl OUT_DIR`."
        )
    folder = fetch_pipeline_folder(source)
    average = _load(folder / "generator", generator_type)
    if average is None:
        raise ValueError(
            f"{source} holds no StyleGAN. Name a run of train_gan.py, or another StyleGAN, with "
            "--init-from."
        )
    discriminator = _load(folder / "discriminator", StyleGANDiscriminator)
    return {"model": average, "ema": average, "discriminator": discriminator}


def _load(path, network_type):
    """Load a network in float32, or return None if there is none."""
    if not (path / "config.json").is_file():
        return None
    _check_type(path, network_type.load_config(path)["_class_name"], network_type)
    check_model(path, network_type)
    return network_type.from_pretrained(path)


def _check_type(path, name, wanted):
    if name != wanted.__name__:
        raise ValueError(
            f"{path} holds a {name}, but this run trains a {wanted.__name__}; set "
            "generator.architecture."
        )


def _fit(state, network, to_grey):
    """Convert `state` to one image channel where `network` has one."""
    expected = network.state_dict()
    return {
        name: to_grey(tensor, expected[name])
        if name in expected and tensor.shape != expected[name].shape
        else tensor
        for name, tensor in state.items()
    }


def add_classes(state: dict, ours: dict) -> dict:
    """Return weights of a network without classes with those that ours with classes has beside.

    They keep their random values, which the weight of the classes, rising from 0, brings in. Other
    weights are returned as they are, but for means of w of each class, which are those of all.
    """
    means, first, embed = (
        f"mapping_network.{name}" for name in ("class_w_means", "layers.0.weight", "embed.weight")
    )
    added = {}
    if means in ours and means not in state and "mapping_network.w_mean" in state:
        added[means] = state["mapping_network.w_mean"].expand_as(ours[means])
    if embed in ours and embed not in state and first in state:
        added |= {name: value for name, value in ours.items() if ".embed." in name}
        num_inputs, num_all = state[first].shape[1], ours[first].shape[1]
        # in use, weights are scaled by 1 / sqrt(inputs)
        kept = state[first] * math.sqrt(num_all / num_inputs)
        added[first] = torch.cat([kept, ours[first][:, num_inputs:].to(kept)], dim=1)
    head = "class_mapping.embed.weight"
    if head in ours and head not in state:
        names = ("class_mapping.", "out.", "out_unconditional.")
        added |= {name: value for name, value in ours.items() if name.startswith(names)}
        if "out_unconditional.weight" in ours:
            added |= {
                f"out_unconditional.{each}": state[f"out.{each}"] for each in ("weight", "bias")
            }
    elif head in state:
        missing = ours.keys() - state.keys()
        added |= {name: ours[name] for name in missing if name.startswith("out_unconditional.")}
    return state | added


def _generator_to_grey(tensor, expected):
    """Convert a last layer's weights [3, ...] to [1, ...], the mean of the three channels."""
    if tensor.shape[:1] == (3,) and expected.shape == (1, *tensor.shape[1:]):
        return tensor.mean(dim=0, keepdim=True)
    return tensor


def _discriminator_to_grey(tensor, expected):
    """Convert a first layer's weights [C, 3, 1, 1] to [C, 1, 1, 1].

    In use, weights are scaled by 1 / sqrt(channels).
    """
    if tensor.ndim == 4 and tensor.shape[1] == 3 and expected.shape[1] == 1:
        return tensor.sum(dim=1, keepdim=True) / 3**0.5
    return tensor


def _compare(state, network, name):
    """List what differs between weights and a network, as at most one sentence."""
    expected = network.state_dict()
    other = [key for key in state if key in expected and state[key].shape != expected[key].shape]
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    parts = [
        f"{len(keys)} tensors {what}"
        for keys, what in ((other, "of another shape"), (missing, "missing"), (unknown, "too many"))
        if keys
    ]
    if not parts:
        return []
    key = next(iter(other), None)
    example = (
        f" (such as {key}: {list(state[key].shape)} for {list(expected[key].shape)})" if key else ""
    )
    return [f"in the {name} {', '.join(parts)}{example}"]


def _compare_options(theirs, ours, name):
    """List options that make two networks differ although their weights have the same shapes."""
    differing = [
        f"{key} {theirs[key]} (ours {ours[key]})"
        for key in theirs.keys() & ours.keys() - FREE_OPTIONS
        if theirs[key] != ours[key]
        and not key.startswith("_")
        and not (key == "num_classes" and theirs[key] == 0)
    ]
    return [f"the {name} was made with {', '.join(sorted(differing))}"] if differing else []


def _list_flags(generator, discriminator):
    """Return the flags of a run whose networks have the sizes of these."""
    options = generator.config
    kind = type(generator).__name__.removesuffix("Generator").lower()
    if kind == "stylegan3":
        kind += "-r" if options.radial_filters else "-t"
    sizes = {"tiles.resolution": options.resolution, "generator.architecture": kind}
    sizes |= {f"generator.{name}": options[name] for name in SIZES}
    if kind == "stylegan2":
        sizes["generator.reduction"] = options.reduction
    if discriminator is not None:
        sizes |= {f"discriminator.{name}": discriminator.config[name] for name in SIZES[3:]}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
