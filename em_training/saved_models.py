"""Check saved models before they are built: what others wrote may be damaged or hostile.

diffusers builds a model from its config.json before it looks at the weights. A config may ask for
any number of layers, and what does not fit is told by a traceback. Here the file of weights is
the measure: only its header is read, and the model is built without memory until it exceeds it.
"""

import contextlib
import importlib
import inspect
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules import module as torch_module

from em_training.config import read_json_object
from em_training.memory import is_out_of_memory

WEIGHTS = "diffusion_pytorch_model.safetensors"
# what torch and diffusers raise for impossible numbers
FAILURES = (RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
LEAST_BOUND = 2**20  # of numbers in a configuration, however small its model
MAX_SCHEDULE = 10**6  # of numbers in a scheduler's configuration
# least and largest value of the options of pipelines
OPTIONS = {
    "pixel_size_nm": (1e-6, 1e9),
    "default_num_inference_steps": (1, 65_536),
    "guidance_scale": (-100, 100),
    "guidance_start": (0, 1),
    "guidance_stop": (0, 1),
}
MAY_BE_NULL = {"pixel_size_nm"}
# names in weights of older versions of diffusers, which converts them
OLD_NAMES = ("query", "key", "value", "proj_attn")


def check_pipeline(folder: Path, pipeline_class: type) -> None:
    """Raise `ValueError` if the components saved in `folder` cannot be those of a pipeline.

    Args:
        folder: Where model_index.json lies.
        pipeline_class: The installed class. Components of its package and of diffusers are known.
    """
    path = folder / "model_index.json"
    index = read_json_object(path)
    optional = getattr(pipeline_class, "_optional_components", ())
    for name, parameter in inspect.signature(pipeline_class).parameters.items():
        value = index.get(name)
        if name not in optional and parameter.default is not inspect.Parameter.empty:
            if name == "id2label":
                check_class_names(path, value)
            elif name in index:
                is_optional = parameter.default is None and name not in OPTIONS
                check_option(path, name, value, is_optional=is_optional or name in MAY_BE_NULL)
            continue
        if name in optional and (name not in index or value == [None, None]):
            continue
        if not (isinstance(value, list) and len(value) == 2 and all(map(is_text, value))):
            raise ValueError(
                f"{path} is damaged: {name} is {json.dumps(value)}, but must be a module and a "
                "class."
            )
        cls = find_class(pipeline_class, *value)
        if cls is None:
            continue  # refused by the pipeline, which knows what to say
        if issubclass(cls, nn.Module):
            check_model(folder / name, cls)
        else:
            check_scheduler(folder / name, cls)


def check_option(path: Path, name: str, value: Any, *, is_optional: bool) -> None:
    """Raise `ValueError` if an option of a saved pipeline is no number within its range."""
    if value is None and is_optional:
        return
    least, most = OPTIONS.get(name, (-math.inf, math.inf))
    if not (is_finite_number(value) and least <= value <= most):
        between = f" from {least:g} to {most:g}" if name in OPTIONS else ""
        raise ValueError(
            f"{path}: {name} is {value!r}, but must be a number{between}"
            f"{' or null' if is_optional else ''}."
        )


def check_class_names(path: Path, names: Any) -> None:
    """Raise `ValueError` if a saved pipeline's `id2label` does not name classes, each once."""
    if names is None:
        return
    if (
        not isinstance(names, dict)
        or set(names) != {str(number) for number in range(len(names))}
        or not all(isinstance(name, str) and name and name.isprintable() for name in names.values())
        or len(set(names.values())) < len(names)
    ):
        raise ValueError(
            f"{path}: id2label is {reprlib.repr(names)}, but must be null or name each class once: "
            '{"0": "first", "1": "second"}.'
        )


def check_model(folder: Path, cls: Any) -> None:
    """Raise `ValueError` if the model saved in `folder` is damaged or no `cls`.

    Its weights must be safetensors, and have the names and shapes that its config.json asks for.
    """
    config_path = folder / "config.json"
    config = read_json_object(config_path)
    shapes = read_shapes(folder)
    bound = sum(map(math.prod, shapes.values()))
    refuse_large_numbers(config, max(LEAST_BOUND, bound), config_path)
    refuse_other_types(config, cls, config_path)
    try:
        with torch.device("meta"), stop_beyond(len(shapes), bound):
            state = cls.from_config(config).state_dict()
    except TooLargeError as error:
        raise ValueError(
            f"{config_path} describes a model that is much larger than its weights "
            f"({len(shapes):,} tensors, {bound:,} numbers). Do not use this model."
        ) from error
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{config_path} does not describe a {cls.__name__} ({type(error).__name__}: {what})."
        ) from error
    if any(part in OLD_NAMES for name in shapes for part in name.split(".")):
        return
    missing = sorted(set(state) - set(shapes))
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the weights that its config.json asks for "
            f"({', '.join(missing[:3])}). Download or save the model again."
        )
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{folder}: {name} has the shape {list(shapes[name])}, but its config.json asks "
                f"for {list(tensor.shape)}. Download or save the model again."
            )


def check_scheduler(folder: Path, cls: Any) -> None:
    """Raise `ValueError` if the scheduler saved in `folder` has no possible noise schedule."""
    path = folder / "scheduler_config.json"
    config = read_json_object(path)
    known = inspect.signature(cls).parameters  # some defaults are infinite
    changed = {
        key: value
        for key, value in config.items()
        if key not in known or value != known[key].default
    }
    refuse_large_numbers(changed, MAX_SCHEDULE, path)
    refuse_other_types(config, cls, path)
    try:
        scheduler = cls.from_config(config)
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} does not describe a {cls.__name__} ({type(error).__name__}: {what})."
        ) from error
    betas = getattr(scheduler, "betas", torch.zeros(1))
    if not (len(betas) and ((betas >= 0) & (betas <= 1)).all()):  # also refuses NaN
        raise ValueError(
            f"{path} has no possible noise schedule: a share of the noise (beta) is not within 0 "
            "to 1. Save the model again with another beta_end."
        )


def refuse_diverged(name: str, model: nn.Module) -> None:
    """Raise `ValueError` if a weight of a model is not finite: its training diverged."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} has weights that are not finite ({key}): its training diverged. Use an "
                "earlier checkpoint, or train again with a smaller learning rate."
            )


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the weights in `folder`, from the headers of safetensors files."""
    names = [WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not (folder / WEIGHTS).is_file() and index.is_file():
        parts = read_json_object(index).get("weight_map")
        names = sorted(set(parts.values())) if isinstance(parts, dict) else []
        if not names or not all(is_text(name) and is_weight_file(name) for name in names):
            raise ValueError(f"{index} is damaged: it must name safetensors files beside it.")
    shapes = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ValueError(
                f"There is no {path}. Weights must be safetensors: pickled ones (.bin, .pt) can "
                "run code when they are loaded, and are not read."
            )
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dictionary)
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is damaged ({error}). Download or save the model again."
            ) from error
    return shapes


def refuse_large_numbers(value: Any, bound: int, path: Path, key: str = "") -> None:
    """Raise `ValueError` for a whole number above `bound` or a number that is not finite."""
    if isinstance(value, dict):
        for name, each in value.items():
            refuse_large_numbers(each, bound, path, name)
    elif isinstance(value, list):
        for each in value:
            refuse_large_numbers(each, bound, path, key)
    elif isinstance(value, int) and abs(value) > bound:
        raise ValueError(f"{path}: {key} is {value}, which is not possible for this model.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: {key} is {value}, but must be finite.")


def refuse_other_types(config: dict, cls: type, path: Path) -> None:
    """Raise `ValueError` for a value whose type is not that of the class's parameter."""
    for name, parameter in inspect.signature(cls).parameters.items():
        default, kind = parameter.default, parameter.annotation
        if name not in config or config[name] is default:
            continue
        if kind is inspect.Parameter.empty:
            kind = type(default)
        value = json.dumps(config[name])
        try:
            TypeAdapter(_allow_any_length(kind)).validate_json(value, strict=True)
        except PydanticSchemaGenerationError:  # of a type that no JSON has
            continue
        except ValidationError as error:
            shown = getattr(kind, "__name__", "") if isinstance(kind, type) else ""
            shown = shown or re.sub(r"\w+\.", "", str(kind))
            value = value if len(value) < 100 else f"{value[:100]}..."
            raise ValueError(
                f"{path}: {name} is {value}, but must be of the type {shown}."
            ) from error


def _allow_any_length(kind: Any) -> Any:
    """Return an annotation with diffusers' `tuple[int]`, which means any number of them, mended."""
    arguments, origin = typing.get_args(kind), typing.get_origin(kind)
    generic: Any = tuple if origin is tuple else typing.Union
    if origin is tuple and len(arguments) == 1:
        return generic[arguments[0], ...]
    if origin in (typing.Union, types.UnionType):
        plain = [each for each in arguments if getattr(each, "__module__", "") != "numpy"]
        return generic[tuple(map(_allow_any_length, plain))]
    return kind


@contextlib.contextmanager
def explain_failure() -> Iterator[None]:
    """Turn an error inside a model that runs into a `ValueError`; a lack of memory stays."""
    try:
        yield
    except FAILURES as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(
            f"The model cannot be run ({type(error).__name__}: {first}). A number in its "
            "config.json may be damaged: download or save it again. If the model is your own, "
            "please report this (EM_TRACEBACK=1 shows where)."
        ) from error


def find_class(pipeline_class: type, module: str, name: str) -> type | None:
    """Return the class of a component, of diffusers or of the pipeline's package; else None."""
    import diffusers

    package = pipeline_class.__module__.rpartition(".")[0]
    if module == "diffusers":
        owner: Any = diffusers
    elif module.isidentifier() and importlib.util.find_spec(f"{package}.{module}"):
        owner = importlib.import_module(f"{package}.{module}")
    else:
        return None
    cls = getattr(owner, name, None)
    kinds = (diffusers.ModelMixin, diffusers.SchedulerMixin)
    return cls if isinstance(cls, type) and issubclass(cls, kinds) else None


class TooLargeError(Exception):
    """A model that is being built has more parts than its weights allow."""


@contextlib.contextmanager
def stop_beyond(num_tensors: int, num_values: int) -> Iterator[None]:
    """Raise `TooLargeError` when the block builds models with far more than these weights.

    Some models build parts that they replace, so several times the number is allowed.
    """
    left = {"modules": 1000 + 50 * num_tensors, "parameters": 100 + 4 * num_tensors}
    left["values"] = LEAST_BOUND + 4 * num_values

    def count(what, number):
        left[what] -= number
        if left[what] < 0:
            raise TooLargeError

    def count_parameter(module, name, parameter):
        if parameter is not None:
            count("parameters", 1)
            count("values", parameter.numel())

    handles = [
        torch_module.register_module_module_registration_hook(
            lambda module, name, child: count("modules", 1)
        ),
        torch_module.register_module_parameter_registration_hook(count_parameter),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_text(value: Any) -> bool:
    """Return True for a string."""
    return isinstance(value, str)


def is_finite_number(value: Any) -> bool:
    """Return True for a number other than NaN and infinity; False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_weight_file(name: str) -> bool:
    """Return True for the name of a safetensors file without a folder."""
    return name.endswith(".safetensors") and not set(name) & set("/\\:")
