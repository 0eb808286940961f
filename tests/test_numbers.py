"""Impossible numbers: a sentence with the flag, before any work."""

import dataclasses
import math
import typing

import pytest
from pydantic import ValidationError

from em_generation.evaluate import EvaluationConfig
from em_generation.families import FAMILIES
from em_generation.generate import GenerationConfig
from em_hub.publish import PublishConfig
from em_training.config import describe_error
from em_training.flags import parse_flags, parse_preset

HUGE = 10**40
NOT_NUMBERS = (math.nan, math.inf, -math.inf)
# these count images or steps, weight a loss, or start a generator; the largest is never reached
UNBOUNDED = ("images", "every", "weight", "rate", "seed", "gamma", "half_life", "clamp", "norm")
UNBOUNDED += ("num_reduced_resolutions", "num_frozen_layers", "pixel_size", "ramp_up", "to_one")
UNBOUNDED += ("micro_batch_size", "rate_scale", "steps")


def is_number(hint) -> bool:
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    return hint in (int, float) or any(map(is_number, typing.get_args(hint)))


def list_numbers(config, path=()):
    """Yield (path, value, whether it is whole) of the fields that hold numbers."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from list_numbers(value, (*path, field.name))
        elif is_number(hints[field.name]):
            yield (*path, field.name), value, "float" not in str(hints[field.name])


def change(config, path, value):
    """Return the configuration with another value of a field."""
    name, *rest = path
    value = change(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: value})


def try_number(config, path, old, value):
    """Return what the refusal says, or None if the value is accepted."""
    try:
        change(config, path, (value,) * len(old) if isinstance(old, tuple) else value)
    except ValidationError as error:
        return describe_error(error)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_number_of_a_training_is_accepted_or_refused_by_its_flag(family):
    config = family.import_presets()["test"]()
    fields = list(list_numbers(config))
    assert len(fields) > 25
    for path, old, is_whole in fields:
        name = ".".join(path)
        for value in (-1, -1.0, 0, 0.0, 10**10, 1e10, *NOT_NUMBERS, HUGE, float(HUGE)):
            text = try_number(config, path, old, value)
            assert text is None or name in text or name.replace("_", "-") in text, (name, value)
            assert text is not None or value not in NOT_NUMBERS, (name, value)
            assert text is not None or value >= 0 or path[-1] in ("target", "image_mean"), (
                name,
                value,
            )
        if not any(word in path[-1] for word in UNBOUNDED):
            assert try_number(config, path, old, 10**10), f"{name} may be 10^10"
            assert try_number(config, path, old, 1e10), f"{name} may be 1e10"
        if "seed" not in name and path[-1] != "pixel_size_nm":
            huge = HUGE if is_whole else float(HUGE)
            assert try_number(config, path, old, huge), f"{name} may be 10^40"


OPTIONS = [
    ([GenerationConfig, FAMILIES[0].options], ["--model", "x", "--out", "y"]),
    ([GenerationConfig, FAMILIES[1].options], ["--model", "x", "--out", "y"]),
    ([EvaluationConfig], ["--models", "x"]),
    ([PublishConfig], ["x", "y/z"]),
]


@pytest.mark.parametrize(("classes", "words"), OPTIONS, ids=["ldm", "stylegan", "evaluate", "hub"])
def test_each_number_of_the_other_commands_is_accepted_or_refused_by_its_flag(classes, words):
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for name in (field.name for field in dataclasses.fields(cls)):
            if not is_number(hints[name]) or "Literal" in str(hints[name]):
                continue
            flag = "--" + name.replace("_", "-")
            positional = ("run", "repo") if cls is PublishConfig else ()
            for value in ("-1001", "nan", "inf", "1e99", str(HUGE)):
                with pytest.raises((ValueError, ValidationError), match=flag):
                    parse_flags(classes, [*words, flag, value], command="x", positional=positional)


def test_numbers_on_the_command_line_of_a_training():
    def parse(*words):
        presets = FAMILIES[0].import_presets()
        options = {"command": "train_ldm.py", "default": "demo", "description": ""}
        with pytest.raises((ValueError, ValidationError)) as refused:
            parse_preset(presets, ["test", *words], main_flags=(), **options)
        error = refused.value
        return describe_error(error) if isinstance(error, ValidationError) else str(error)

    assert parse("--tiles.seed", "-1") == (
        "tiles.seed is -1, but must be at least 0. Use --tiles.seed."
    )
    assert "Use --denoiser.learning-rate" in parse("--denoiser.learning-rate", "nan")
    assert "less than or equal" not in parse("--autoencoder.layers-per-block", "1000000000")
    assert "Use --autoencoder.num-codes" in parse("--autoencoder.num-codes", "0")
    assert "--autoencoder.discriminator-layers" in parse(
        "--autoencoder.discriminator-layers", "10000000000"
    )
