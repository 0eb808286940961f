"""What our pipelines share: each is saved with its code, and the installed class runs no other.

A saved pipeline holds one file: this text stands in it in place of its import, see `read_source`.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin

HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
REMOTE_OPTIONS = ("trust_remote_code", "output_loading_info")
_MOVED: dict[str, Any] = {}  # modules of repositories by their first name, see `read_source`
# imports of files of ours, which become a part of a published file
_OWN_IMPORT = re.compile(
    rb"^from (\.\w+|em_\w+\.(?:pipeline_)?em_\w+) import (?:\([^)]*\)|[^\n(]*)\n", re.MULTILINE
)


class SavedWithCode:
    """A pipeline that is saved with its code and loads installed code alone; a mixin.

    Attributes:
        _package: Where the pipeline's file and the components that it may load are installed.
    """

    _package: ClassVar[str]
    components: Any
    config_name: Any

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a model's weights are brought to aligned memory first."""
        if isinstance(value, torch.nn.Module):
            align_weights(value)
        super().__setattr__(name, value)

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does; weights are always safetensors.

        Raises:
            ValueError: For safe_serialization=False.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization is False, but pickled weights can run code when they are "
                "loaded, and this pipeline does not load them. Leave safe_serialization out."
            )
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    def save_config(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write model_index.json, and the files of all classes that are not diffusers'.

        The folder can then be loaded without our packages. Local paths from which components were
        loaded are removed.
        """
        super().save_config(save_directory, push_to_hub=False, **kwargs)  # type: ignore[misc]
        folder, components = Path(save_directory), self.components
        paths = [folder / name / "config.json" for name in components]
        paths = [folder / self.config_name, *filter(Path.exists, paths)]
        configs = [json.loads(path.read_text()) for path in paths]
        index = configs[0]
        index["_class_name"] = write_source(type(self), folder)
        for name, component in components.items():
            if cls := find_own_class(component):
                index[name] = write_source(cls, folder / name)
        for path, config in zip(paths, configs):
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """Make a pipeline from another one's components; see `DiffusionPipeline.from_pipe`.

        diffusers takes over only models of exactly the annotated class; ours is a base class.
        """
        own = cls._get_signature_keys(cls)[0]  # type: ignore[attr-defined]
        return super().from_pipe(  # type: ignore[misc]
            pipeline, **{k: v for k, v in pipeline.components.items() if k in own} | kwargs
        )

    @classmethod
    def _load_own_components(cls, source, options):
        """Load the components that are not diffusers' by installed code.

        options: Those of `from_pretrained`. Returned with the components, and without what would
            run code of the folder.
        """
        options = {k: v for k, v in options.items() if k not in REMOTE_OPTIONS}
        dtype = options.pop("torch_dtype", options.pop("dtype", None))
        dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
        hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
        index = DiffusionPipeline.load_config(source, **hub_options)
        for name, value in index.items():
            if is_own_component(name, value) and name not in options:
                component = import_own_component(cls._package, source, name, *value)
                found = dtypes.get(name, dtypes.get("default"))
                typed = {"torch_dtype": found} if isinstance(found, torch.dtype) else {}
                where = {"subfolder": name, "use_safetensors": True}
                options[name] = load_component(
                    component, source, options.get("variant"), hub_options | where | typed
                )
        return options | {"dtype": dtype}

    @classmethod
    def _is_installed(cls):
        """Return False if this text came with a repository."""
        return __name__.partition(".")[0] == "em_training"

    @classmethod
    def _dict_from_json_file(cls, *args, **kwargs):
        """Read model_index.json as that of this class: diffusers then runs no code of the folder.

        Components of our own, which `from_pretrained` loads, are listed as diffusers' for the same
        reason.
        """
        index = super()._dict_from_json_file(*args, **kwargs)
        name = index.get("_class_name")
        name = name[-1] if isinstance(name, list | tuple) else name
        if name is not None and name != cls.__name__:
            raise ValueError(
                f"This is a {name}, not a {cls.__name__}. Load it with {name} or DiffusionPipeline."
            )
        if name is None or not cls._is_installed():
            return index
        own = [key for key, value in index.items() if is_own_component(key, value)]
        return {**index, "_class_name": name} | {key: ["diffusers", "ModelMixin"] for key in own}


class NamesClasses:
    """A pipeline whose model may have classes, with names in its config `id2label`; a mixin."""

    config: Any

    @property
    def labels(self) -> dict[str, int]:
        """Number of each class by its name, sorted by name; empty if there are no names."""
        names = self.config.get("id2label") or {}
        return dict(sorted((name, int(number)) for number, name in names.items()))

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return the numbers of classes from their names; `ValueError` for an unknown name."""
        names, labels = [label] if isinstance(label, str) else list(label), self.labels
        for name in names:
            if name not in labels:
                known = f"choose from {', '.join(labels)}" if labels else "this model has no names"
                raise ValueError(f"`label` {name!r} is no class of this model; {known}.")
        return [labels[name] for name in names]


def check_class_names(names, num_classes: int) -> dict[str, str] | None:
    """Return {"0": name, ...} of all classes, or None; raise `ValueError` otherwise."""
    if names is None:
        return None
    names = {str(number): str(names[number]) for number in sorted(names, key=int)}
    if (
        list(names) != [str(number) for number in range(num_classes)]
        or len(set(names.values())) < len(names)
        or not num_classes
    ):
        raise ValueError(
            f"`id2label` is {names}, but the model has {num_classes} classes, counted from 0. Give "
            "each one a name of its own."
        )
    return names


def refuse_pickles(options: dict[str, Any]) -> None:
    """Ask for safetensors in the options of `from_pretrained`; refuse anything else."""
    if options.setdefault("use_safetensors", True) is not True:
        raise ValueError(
            "use_safetensors is False, but pickled weights can run code when they are loaded. "
            "Leave use_safetensors out, and convert the weights to safetensors."
        )


def align_weights(model):
    """Copy weights whose address is no multiple of 64 bytes to aligned memory; return `model`.

    safetensors loads tensors at any address. Some CPU kernels round differently there, so that a
    loaded model and the same model in memory would give images that differ in their last digits.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cpu
        if is_plain and tensor.layout == torch.strided and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def is_own_component(name, value):
    """Return True if an entry of model_index.json names a component that is not diffusers'."""
    return (
        not name.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and value[0] not in (None, "diffusers")
    )


def find_kept_options(model):
    """Return the options of the last pipeline that had `model`; {} if there was none."""
    return getattr(getattr(model, "_orig_mod", model), "_pipeline_options", {})


def keep_options(pipeline, model):
    """Let `model` remember the options of its pipeline, in memory only."""
    if isinstance(model, torch.nn.Module):
        model = getattr(model, "_orig_mod", model)  # torch.compile wraps
        model._pipeline_options = dict(pipeline.config)


def find_own_class(component):
    """Return the class of a component that is not diffusers', compiled or not; else None."""
    cls = type(getattr(component, "_orig_mod", component))
    is_own = component is not None and cls.__module__.split(".")[0] != "diffusers"
    return cls if is_own else None


def load_component(component, source, variant, options):
    """Load a component; like diffusers, without the variant if it has none."""
    if variant:
        with contextlib.suppress(OSError):
            return component.from_pretrained(source, variant=variant, **options)
    return component.from_pretrained(source, **options)


def import_own_component(package, source, name, module, class_name):
    """Return the installed class that model_index.json names, or raise `ValueError`."""
    is_ours = isinstance(module, str) and re.fullmatch(r"em_[a-z0-9_]+", module)
    found = is_ours and importlib.util.find_spec(f"{package}.{module}")
    component = None
    if found:
        component = getattr(importlib.import_module(f"{package}.{module}"), class_name, None)
    if not isinstance(component, type) or not issubclass(component, ModelMixin):
        raise ValueError(
            f"{source} holds the {name} {module}.{class_name}, which this version of {package} "
            "does not have. Update the package, or use DiffusionPipeline with "
            "trust_remote_code=True if you have read the repository's code."
        )
    return component


def wake(model):
    """Bring an offloaded model to its device before a method other than `forward` is called."""
    hook = getattr(model, "_hf_hook", None)
    if hasattr(hook, "pre_forward"):
        hook.pre_forward(model)


def read_source(cls):
    """Return the file that defines a class: (name without suffix, content).

    Files of ours that it imports are parts of the content: diffusers copies such files, but Python
    does not find them in a repository whose name has a dot.

    diffusers copies the files of all repositories into one folder. A second repository's file
    replaces a first one's of the same name, in the module that already runs, too. So the class
    keeps its source from the first call on, and a class that came with a repository moves with its
    module to a name of its own. The compiled file goes, since Python may take it for the second
    file's if both have one size. A second component from the same file is a class of the module
    that has just moved.
    """
    if "_source" in vars(cls):
        return cls._source
    module = sys.modules.get(cls.__module__) or _MOVED[cls.__module__]
    path = Path(inspect.getsourcefile(module))
    text, package = path.read_bytes(), cls.__module__.rpartition(".")[0]
    if package.startswith("em_"):
        text = _join_imports(text, package, set())
    cls._source = (path.stem, text)
    if not cls.__module__.startswith("diffusers_modules."):
        return cls._source
    with contextlib.suppress(OSError):
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    name = cls.__module__
    _MOVED[name] = module
    sys.modules.pop(name, None)
    new_name = f"{name}_{hashlib.sha256(cls._source[1]).hexdigest()[:12]}"
    while new_name in sys.modules:
        new_name += "_"
    _move(cls, module, new_name)
    return cls._source


def _join_imports(text: bytes, package: str, joined: set[str]) -> bytes:
    """Put the text of each file of ours that `text` imports in place of its first import."""

    def find_text(match):
        name = match[1].decode()
        name = package + name if name.startswith(".") else name
        if name in joined:
            return b""
        joined.add(name)
        path = Path(inspect.getsourcefile(importlib.import_module(name)))
        return _join_imports(path.read_bytes(), name.rpartition(".")[0], joined)

    return _OWN_IMPORT.sub(find_text, text)


def _move(cls, module, new_name):
    """Give a class and all that its module defines a module of another name, as pickle needs it."""
    moved = types.ModuleType(new_name)
    vars(moved).update({k: v for k, v in vars(module).items() if k != "__name__"})
    setattr(moved, cls.__name__, cls)
    name = cls.__module__
    for each in vars(moved).values():
        if (inspect.isclass(each) or inspect.isfunction(each)) and each.__module__ == name:
            each.__module__ = new_name
    sys.modules[new_name] = moved


def write_source(cls, folder: Path):
    """Write the file that defines a class into `folder`; return [name without suffix, class]."""
    stem, content = read_source(cls)
    path = folder / f"{stem}.py"
    if not path.is_file() or path.read_bytes() != content:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [stem, cls.__name__]
