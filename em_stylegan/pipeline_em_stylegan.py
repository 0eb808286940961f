"""StyleGAN for grey electron micrographs, in one file that is saved with every pipeline.

It needs only torch, numpy, diffusers and the standard library.
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
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NOISE_MODES = ("random", "const", "none")
PACKAGE = "em_stylegan"  # where this file and the components that it may load are installed
_MOVED: dict[str, Any] = {}  # modules of repositories by their first name, see `_read_source`
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")


class EMStyleGANPipeline(DiffusionPipeline):
    """Generates 1-channel micrographs in one pass: z -> w (mapping) -> image (synthesis).

    Args:
        generator: A `StyleGAN2Generator`, `StyleGAN3Generator` or `StyleGAN1Generator` (2019).
        pixel_size_nm: Side of a pixel of the generated images in nanometres, or None if unknown.
            Default: that of the last pipeline that had this generator, so that
            `type(pipe)(**pipe.components)` is the same pipeline again; unknown for a new generator.
        id2label: {number of a class: its name}, or None for classes without names. Default: as of
            `pixel_size_nm`.
    """

    model_cpu_offload_seq = "generator"

    def __init__(
        self,
        generator: ModelMixin,
        pixel_size_nm: float | str | None = "kept",
        id2label: dict[int, str] | dict[str, str] | str | None = "kept",
    ):
        super().__init__()
        _read_source(type(getattr(generator, "_orig_mod", generator)))
        self.register_modules(generator=generator)
        kept = _find_kept_options(generator)
        size = kept.get("pixel_size_nm") if pixel_size_nm == "kept" else pixel_size_nm
        self.register_to_config(pixel_size_nm=None if size is None else float(size))
        names = kept.get("id2label") if id2label == "kept" else id2label
        if names is not None:
            names = {str(number): str(names[number]) for number in sorted(names, key=int)}
            numbers = [str(number) for number in range(self.num_classes)]
            if list(names) != numbers or len(set(names.values())) < len(names):
                raise ValueError(
                    f"`id2label` is {names}, but the generator has {self.num_classes} classes, "
                    "counted from 0. Give each one a name of its own."
                )
        self.register_to_config(id2label=names)
        _keep_options(self, generator)

    def __setattr__(self, name, value):
        """Set an attribute; a model's weights are brought to aligned memory first."""
        if isinstance(value, torch.nn.Module):
            align_weights(value)
        super().__setattr__(name, value)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str | None = None,
        class_labels: torch.Tensor | list[int | str] | int | str | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate `batch_size` images. There are no steps, and so there is no progress bar.

        Args:
            generator: One `torch.Generator` for the batch, or a list of `batch_size`. With a list,
                image i depends on generator i alone.
            truncation_psi: 1 draws from the whole distribution. Smaller values move w towards its
                mean in the first `truncation_cutoff` layers (by default in all).
            noise_mode: "random" (drawn from `generator` after z), "const" (the stored noise maps,
                the same in every image) or "none". Default: "random", as in training, and "const"
                for given `latents`, where fresh noise would flicker from one image to the next.
            class_labels: For a generator with classes: a number or name of a class for each image,
                one for all, or rows of weights [B, num_classes]. Default: drawn from `generator`
                after z, all classes alike, since such a generator has no images without a class.
            latents: w [B, num_ws, w_dim] or [B, w_dim], as output_type "latent" returns them, in
                place of a random z. `batch_size`, classes and truncation then have no effect.
            output_type: "pil" (mode "L"), "np" (float32 [B, H, W, 1] in [0, 1]), "pt" (float32
                [B, 1, H, W] in [0, 1]) or "latent" (w of every layer after truncation, float32
                [B, num_ws, w_dim]).
            return_dict: Return an `ImagePipelineOutput`; if False, a tuple with the images.
            height, width: Pixels of the images. Only StyleGAN3 draws larger ones than its tile, on
                a larger canvas. Default: those of a tile.

        Raises:
            ValueError: For an impossible argument, such as an unknown class, or if the output is
                not finite: then the training has diverged, or half precision has overflowed.
        """
        noise_mode = noise_mode or ("random" if latents is None else "const")
        self._check_inputs(
            batch_size, generator if latents is None else None, noise_mode, output_type
        )
        options = self.find_canvas(height, width)
        _wake(self.generator)
        styles = self._check_classes(class_labels, batch_size), truncation_psi, truncation_cutoff
        if latents is None:
            ws = self._draw_styles(batch_size, generator, *styles)
        else:
            ws = self._prepare_latents(latents, generator)  # [B, num_ws, w_dim]
        if output_type == "latent":
            images = self.check_finite(ws.float())
        else:
            images = self.check_finite(
                self.generator.synthesis(ws, noise_mode, generator, **options)
            )
            images = self._convert(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def components(self) -> dict[str, Any]:
        """The generator by its name; a new pipeline of it has the same options."""
        _keep_options(self, self.generator)
        return super().components

    def find_canvas(self, height: int | None = None, width: int | None = None) -> dict[str, Any]:
        """Return arguments of the generator's `synthesis` for images of (height, width).

        Raises:
            ValueError: The generator cannot draw that size.
        """
        tile = self.generator.config.resolution
        size = (height or tile, width or tile)
        if size == (tile, tile):
            return {}
        model: Any = getattr(self.generator, "_orig_mod", self.generator)
        if not hasattr(model, "find_extra"):
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels cannot be drawn: a {type(model).__name__} "
                f"has one size, {tile} x {tile}. Use a StyleGAN3 or a latent diffusion model."
            )
        model.find_extra(size)
        return {"size": size}

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a generator without classes."""
        return self.generator.config.get("num_classes", 0)

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

    def _check_classes(self, class_labels, batch_size):
        """Return class labels with names as numbers; raise `ValueError` for impossible ones."""
        if class_labels is None:
            return None
        if not self.num_classes:
            raise ValueError("This model has no classes. Leave `class_labels` out.")
        if isinstance(class_labels, str):
            class_labels = self.get_label_ids(class_labels)[0]
        elif isinstance(class_labels, list | tuple):
            class_labels = [
                self.get_label_ids(each)[0] if isinstance(each, str) else each
                for each in class_labels
            ]
        labels = torch.as_tensor(class_labels).cpu()
        shapes, last = ((), (batch_size,)), self.num_classes - 1
        is_number = tuple(labels.shape) in shapes and not labels.is_floating_point()
        if is_number and 0 <= labels.min() <= labels.max() <= last:
            return labels
        if tuple(labels.shape) == (batch_size, self.num_classes):
            return labels
        raise ValueError(
            f"`class_labels` is {class_labels}; give numbers from 0 to {last} or names of classes: "
            f"one for all images, or one for each of {batch_size}."
        )

    def _draw_classes(self, batch_size, generator):
        """Draw a class for each image, all classes alike."""
        rngs = list(generator) if isinstance(generator, list | tuple) else [generator]
        shape = (batch_size // len(rngs),)
        draws = [
            torch.randint(self.num_classes, shape, generator=rng, device=rng and rng.device).cpu()
            for rng in rngs
        ]
        return torch.cat(draws)

    def _check_inputs(self, batch_size, generator, noise_mode, output_type):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
        if isinstance(generator, list | tuple) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators for {batch_size} images; give one for each, or a "
                "single one."
            )
        for name, value, choices in (
            ("noise_mode", noise_mode, NOISE_MODES),
            ("output_type", output_type, OUTPUT_TYPES),
        ):
            if value not in choices:
                raise ValueError(f'`{name}` is "{value}"; choose one of {", ".join(choices)}.')

    def check_finite(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values`, or raise `ValueError` if a NaN or infinity is among them."""
        if not torch.isfinite(values).all():
            raise ValueError(
                "The generator's output is not finite (NaN or infinity). Its training diverged, or "
                f"{self.generator.dtype} overflowed. Load an earlier checkpoint, or use float32."
            )
        return values

    def _draw_styles(self, batch_size, generator, class_labels, psi, cutoff):
        """Draw z and return w of every layer [B, num_ws, w_dim], truncated."""
        shape, device = (batch_size, self.generator.config.z_dim), self._execution_device
        z = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if class_labels is None and self.num_classes:
            class_labels = self._draw_classes(batch_size, generator)
        return self.generator.mapping(z.to(self.generator.dtype), class_labels, psi, cutoff)

    def _prepare_latents(self, latents, generator):
        num_ws, w_dim = self.generator.num_ws, self.generator.config.w_dim
        if latents.ndim == 2:
            latents = latents.unsqueeze(1).expand(-1, num_ws, -1)
        if tuple(latents.shape[1:]) != (num_ws, w_dim):
            raise ValueError(
                f"`latents` has the shape {tuple(latents.shape)}; give [B, {num_ws}, {w_dim}] or "
                f"[B, {w_dim}]."
            )
        if isinstance(generator, list | tuple) and len(generator) != len(latents):
            raise ValueError(
                f"{len(generator)} generators for {len(latents)} latents; give one for each, or a "
                "single one."
            )
        return latents.to(self._execution_device, self.generator.dtype)

    def _convert(self, images, output_type):
        images = (images.float() / 2 + 0.5).clamp(0, 1)  # [B, 1, H, W]
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 1]
        return images if output_type == "np" else self.numpy_to_pil(images)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does; weights are always safetensors."""
        if not (args[0] if args else kwargs.get("safe_serialization", True)):
            raise ValueError(
                "safe_serialization is False, but pickled weights can run code when they are "
                "loaded, and this pipeline does not load them. Leave safe_serialization out."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_config(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write model_index.json and the code, so that the folder loads without our packages.

        The index names the pipeline's file and the generator's, such as
        generator/em_stylegan2_generator.py. Local paths are left out.
        """
        super().save_config(save_directory, push_to_hub=False, **kwargs)
        folder = Path(save_directory)
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text())
        index["_class_name"] = _write_source(type(self), folder)
        cls = type(getattr(self.generator, "_orig_mod", self.generator))  # torch.compile wraps
        index["generator"] = _write_source(cls, folder / "generator")
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path in (index_path, folder / "generator" / "config.json"):
            if path.exists():
                config = json.loads(path.read_text())
                config.pop("_name_or_path", None)
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "EMStyleGANPipeline":
        """Load a folder or Hub repository; see `DiffusionPipeline.from_pretrained` for the options.

        The installed class loads the generator with installed code. It runs no code from the
        repository and needs no `trust_remote_code`. Weights are read from safetensors only.

        Raises:
            ValueError: For a generator that this version does not know, or pickled weights.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(
                "use_safetensors is False, but pickled weights can run code when they are loaded. "
                "Leave use_safetensors out, and convert the weights to safetensors."
            )
        source = pretrained_model_name_or_path
        if not cls._is_installed():
            return super().from_pretrained(source, **kwargs)
        for name in ("trust_remote_code", "output_loading_info"):
            kwargs.pop(name, None)
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
        if isinstance(dtype, dict):  # of each component
            dtype = dtype.get("generator", dtype.get("default"))
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        index = DiffusionPipeline.load_config(source, **options)
        if "generator" not in kwargs:
            names = index.get("generator") or (None, None)
            component = _import_own_component(source, "generator", *names)
            if isinstance(dtype, torch.dtype):
                options["torch_dtype"] = dtype
            options |= {"subfolder": "generator", "use_safetensors": True}
            kwargs["generator"] = _load(component, source, kwargs.get("variant"), options)
        return super().from_pretrained(source, dtype=dtype, **kwargs)

    # Copied from em_diffusion.pipeline_em_ldm.EMLatentDiffusionPipeline.from_pipe
    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """Make a pipeline from another one's components; see `DiffusionPipeline.from_pipe`.

        diffusers takes over only models of exactly the annotated class; ours is a base class.
        """
        own = cls._get_signature_keys(cls)[0]
        return super().from_pipe(
            pipeline, **{k: v for k, v in pipeline.components.items() if k in own} | kwargs
        )

    # Copied from em_diffusion.pipeline_em_ldm.EMLatentDiffusionPipeline._is_installed
    @classmethod
    def _is_installed(cls):
        """Return False if this file came with a repository."""
        return __name__.rpartition(".")[0] == PACKAGE

    # Copied from em_diffusion.pipeline_em_ldm.EMLatentDiffusionPipeline._dict_from_json_file
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
        own = [key for key, value in index.items() if _is_own_component(key, value)]
        return {**index, "_class_name": name} | {key: ["diffusers", "ModelMixin"] for key in own}


# Copied from em_diffusion.pipeline_em_ldm.align_weights
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


# Copied from em_diffusion.pipeline_em_ldm._is_own_component
def _is_own_component(name, value):
    """Return True if an entry of model_index.json names a component that is not diffusers'."""
    return (
        not name.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and value[0] not in (None, "diffusers")
    )


# Copied from em_diffusion.pipeline_em_ldm._find_kept_options
def _find_kept_options(model):
    """Return the options of the last pipeline that had `model`; {} if there was none."""
    return getattr(getattr(model, "_orig_mod", model), "_pipeline_options", {})


# Copied from em_diffusion.pipeline_em_ldm._keep_options
def _keep_options(pipeline, model):
    """Let `model` remember the options of its pipeline, in memory only."""
    if isinstance(model, torch.nn.Module):
        model = getattr(model, "_orig_mod", model)  # torch.compile wraps
        model._pipeline_options = dict(pipeline.config)


# Copied from em_diffusion.pipeline_em_ldm._load
def _load(component, source, variant, options):
    """Load a component; like diffusers, without the variant if it has none."""
    if variant:
        with contextlib.suppress(OSError):
            return component.from_pretrained(source, variant=variant, **options)
    return component.from_pretrained(source, **options)


# Copied from em_diffusion.pipeline_em_ldm._import_own_component
def _import_own_component(source, name, module, class_name):
    """Return the installed class that model_index.json names, or raise `ValueError`."""
    is_ours = isinstance(module, str) and re.fullmatch(r"em_[a-z0-9_]+", module)
    found = is_ours and importlib.util.find_spec(f"{PACKAGE}.{module}")
    component = None
    if found:
        component = getattr(importlib.import_module(f"{PACKAGE}.{module}"), class_name, None)
    if not isinstance(component, type) or not issubclass(component, ModelMixin):
        raise ValueError(
            f"{source} holds the {name} {module}.{class_name}, which this version of {PACKAGE} "
            "does not have. Update the package, or use DiffusionPipeline with "
            "trust_remote_code=True if you have read the repository's code."
        )
    return component


# Copied from em_diffusion.pipeline_em_ldm._wake
def _wake(model):
    """Bring an offloaded model to its device before a method other than `forward` is called."""
    hook = getattr(model, "_hf_hook", None)
    if hasattr(hook, "pre_forward"):
        hook.pre_forward(model)


# Copied from em_diffusion.pipeline_em_ldm._read_source
def _read_source(cls):
    """Return the file that defines a class: (name without suffix, content).

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
    cls._source = (path.stem, path.read_bytes())
    if cls.__module__.startswith("diffusers_modules."):
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


# Copied from em_diffusion.pipeline_em_ldm._move
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


# Copied from em_diffusion.pipeline_em_ldm._write_source
def _write_source(cls, folder: Path):
    """Write the file that defines a class into `folder`; return [name without suffix, class]."""
    stem, content = _read_source(cls)
    path = folder / f"{stem}.py"
    if not path.is_file() or path.read_bytes() != content:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [stem, cls.__name__]


_read_source(EMStyleGANPipeline)
