"""Unpaired translation of grey electron micrographs: one file that is saved with every pipeline.

It needs only torch, numpy, PIL, diffusers and the standard library.
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

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from PIL import Image

OUTPUT_TYPES = ("pil", "np", "pt")
DIRECTIONS = ("a_to_b", "b_to_a")
PACKAGE = "em_cyclegan"  # where this file and the components that it may load are installed
_MOVED: dict[str, Any] = {}  # modules of repositories by their first name, see `_read_source`
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
STRIDE, MIN_SIDE = 4, 8  # of the generators: sides are multiples of 4, at least 8


class EMTranslationPipeline(DiffusionPipeline):
    """Translates 1-channel micrographs from a domain a, such as simulated ones, to a domain b.

    What an image shows stays where it is, and so do the labels of a simulated image. Each image is
    translated by itself, and the same image always gives the same result.

    Args:
        generator_a_to_b: An `EMResnetGenerator` that translates from a to b.
        generator_b_to_a: One for the other direction; None for a model without it.
        pixel_size_nm: Side of a pixel in nanometres of the images that the model was trained to
            translate, or None if unknown. Default: that of the last pipeline that had this
            generator, so that `type(pipe)(**pipe.components)` is the same pipeline again.
    """

    model_cpu_offload_seq = "generator_a_to_b->generator_b_to_a"
    _optional_components: ClassVar[list[str]] = ["generator_b_to_a"]

    def __init__(
        self,
        generator_a_to_b: ModelMixin,
        generator_b_to_a: ModelMixin | None = None,
        pixel_size_nm: float | str | None = "kept",
    ):
        super().__init__()
        for component in (generator_a_to_b, generator_b_to_a):
            if cls := _find_own_class(component):
                _read_source(cls)
        self.register_modules(generator_a_to_b=generator_a_to_b, generator_b_to_a=generator_b_to_a)
        kept = _find_kept_options(generator_a_to_b)
        size = kept.get("pixel_size_nm") if pixel_size_nm == "kept" else pixel_size_nm
        self.register_to_config(pixel_size_nm=None if size is None else float(size))
        _keep_options(self, generator_a_to_b)

    def __setattr__(self, name, value):
        """Set an attribute; a model's weights are brought to aligned memory first."""
        if isinstance(value, torch.nn.Module):
            align_weights(value)
        super().__setattr__(name, value)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        direction: str = "a_to_b",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Translate one image or several of one size. There is no noise, and so no generator.

        Args:
            image: A grey image or a list of them: PIL images (8 or 16 bits), arrays [H, W],
                [B, H, W] or [B, H, W, 1], or tensors [H, W], [B, H, W] or [B, 1, H, W]. Floats are
                in [0, 1]; uint8 and uint16 are divided by 255 and 65535. H and W are multiples of
                4, at least 8.
            direction: "a_to_b" or "b_to_a".
            output_type: "pil" (mode "L"), "np" (float32 [B, H, W, 1] in [0, 1]) or "pt" (float32
                [B, 1, H, W] in [0, 1]).
            return_dict: Return an `ImagePipelineOutput`; if False, a tuple with the images.

        Raises:
            ValueError: For an impossible argument, or if the output is not finite.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f'`output_type` is "{output_type}"; choose one of {", ".join(OUTPUT_TYPES)}.'
            )
        images = self._convert(self.translate(prepare_images(image), direction), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def translate(self, images: torch.Tensor, direction: str = "a_to_b") -> torch.Tensor:
        """Translate images float32 [B, 1, H, W] in [-1, 1]; the result is of the same kind.

        Raises:
            ValueError: For sides that the generator cannot translate, a direction that the model
                does not have, or an output that is not finite.
        """
        if direction not in DIRECTIONS:
            raise ValueError(
                f'`direction` is "{direction}"; choose one of {", ".join(DIRECTIONS)}.'
            )
        generator = self.generator_a_to_b if direction == "a_to_b" else self.generator_b_to_a
        if generator is None:
            raise ValueError(
                '`direction` is "b_to_a", but this model translates from a to b only: it was '
                "trained by the contrastive method."
            )
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE or min(height, width) < MIN_SIDE:
            raise ValueError(
                f"The image has {height} x {width} pixels, but both sides must be multiples of "
                f"{STRIDE} and at least {MIN_SIDE}. Crop it, or pad it by reflection."
            )
        images = generator(images.to(self._execution_device, generator.dtype)).float()
        if not torch.isfinite(images).all():
            raise ValueError(
                "The generator's output is not finite (NaN or infinity). Its training diverged, or "
                f"{generator.dtype} overflowed. Load an earlier checkpoint, or use float32."
            )
        return images.clamp(-1, 1)

    @property
    def components(self) -> dict[str, Any]:
        """The generators by their names; a new pipeline of them has the same options."""
        _keep_options(self, self.generator_a_to_b)
        return super().components

    # Copied from em_stylegan.pipeline_em_stylegan.EMStyleGANPipeline._convert
    def _convert(self, images, output_type):
        images = (images.float() / 2 + 0.5).clamp(0, 1)  # [B, 1, H, W]
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 1]
        return images if output_type == "np" else self.numpy_to_pil(images)

    # Copied from em_stylegan.pipeline_em_stylegan.EMStyleGANPipeline.save_pretrained
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does; weights are always safetensors."""
        if not (args[0] if args else kwargs.get("safe_serialization", True)):
            raise ValueError(
                "safe_serialization is False, but pickled weights can run code when they are "
                "loaded, and this pipeline does not load them. Leave safe_serialization out."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    # Copied from em_diffusion.pipeline_em_ldm.EMLatentDiffusionPipeline.save_config
    def save_config(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write model_index.json, and the files of all classes that are not diffusers'.

        The folder can then be loaded without our packages. Local paths from which components were
        loaded are removed.
        """
        super().save_config(save_directory, push_to_hub=False, **kwargs)
        folder = Path(save_directory)
        paths = [folder / name / "config.json" for name in self.components]
        paths = [folder / self.config_name, *filter(Path.exists, paths)]
        configs = [json.loads(path.read_text()) for path in paths]
        index = configs[0]
        index["_class_name"] = _write_source(type(self), folder)
        for name, component in self.components.items():
            if cls := _find_own_class(component):
                index[name] = _write_source(cls, folder / name)
        for path, config in zip(paths, configs):
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "EMTranslationPipeline":
        """Load a folder or Hub repository; see `DiffusionPipeline.from_pretrained` for the options.

        The installed class loads the generators with installed code. It runs no code from the
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
        dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        index = DiffusionPipeline.load_config(source, **hub_options)
        for name, value in index.items():
            if _is_own_component(name, value) and name not in kwargs:
                component = _import_own_component(source, name, *value)
                options = hub_options | {"subfolder": name, "use_safetensors": True}
                found = dtypes.get(name, dtypes.get("default"))
                if isinstance(found, torch.dtype):
                    options["torch_dtype"] = found
                kwargs[name] = _load(component, source, kwargs.get("variant"), options)
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


def prepare_images(image: Any) -> torch.Tensor:
    """Return images as float32 [B, 1, H, W] in [-1, 1]; see `EMTranslationPipeline.__call__`.

    Raises:
        ValueError: No image, colours, values outside of [0, 1], or images of different sizes.
    """
    if isinstance(image, list | tuple):
        if not image:
            raise ValueError("`image` is an empty list. Give at least one image.")
        images = [prepare_images(each) for each in image]
        sizes = sorted({tuple(each.shape[-2:]) for each in images})
        if len(sizes) > 1:
            raise ValueError(
                f"The images have different sizes ({', '.join(f'{h} x {w}' for h, w in sizes)}). "
                "Translate those of each size by a call of their own."
            )
        return torch.cat(images)
    if isinstance(image, Image.Image):
        image = _read_grey(image)
    if isinstance(image, torch.Tensor):
        channel, image = 1, image.detach().cpu()
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
    elif isinstance(image, np.ndarray):
        channel = -1
    else:
        raise ValueError(
            f"`image` is a {type(image).__name__}; give a PIL image, an array, a tensor, or a list "
            "of them."
        )
    shape = image.shape
    if image.ndim == 4 and shape[channel] == 1:
        image = image.squeeze(channel)
    if image.ndim not in (2, 3) or 0 in shape:
        raise ValueError(
            f"`image` has the shape {list(shape)}; give [H, W], [B, H, W], or four dimensions of "
            "which one is the single channel. Colours are not translated."
        )
    image = image if image.ndim == 3 else image[None]
    return torch.from_numpy(_scale(image)).unsqueeze(1) * 2 - 1


def _read_grey(image):
    """Return a PIL image as an array [H, W] of its own levels; refuse colours."""
    if image.mode in ("L", "I;16", "I;16L", "I;16B", "I;16N"):
        pixels = np.asarray(image)
        return pixels if image.mode == "L" else pixels.astype(np.uint16)
    if image.mode in ("RGB", "RGBA", "P", "LA"):
        colours = np.asarray(image.convert("RGB"))
        if (colours == colours[..., :1]).all():
            return colours[..., 0]
        raise ValueError(
            'The image has colours, and this model translates grey images. Use image.convert("L").'
        )
    raise ValueError(
        f"The image has the mode {image.mode}, whose range of grey levels is unknown. Give 8 or 16 "
        "bits, or an array of floats in [0, 1]."
    )


def _scale(image):
    """Return an array as float32 in [0, 1]."""
    if image.dtype in (np.uint8, np.uint16):
        return image.astype(np.float32) / np.iinfo(image.dtype).max
    if image.dtype.kind != "f":
        raise ValueError(f"`image` holds {image.dtype}; give uint8, uint16, or floats in [0, 1].")
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"`image` holds floats from {image.min():g} to {image.max():g}, but they must be in "
            "[0, 1]. Scale them first, as the tiles of the training were scaled."
        )
    return image.astype(np.float32)


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


# Copied from em_diffusion.pipeline_em_ldm._find_own_class
def _find_own_class(component):
    """Return the class of a component that is not diffusers', compiled or not; else None."""
    cls = type(getattr(component, "_orig_mod", component))
    is_own = component is not None and cls.__module__.split(".")[0] != "diffusers"
    return cls if is_own else None


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


_read_source(EMTranslationPipeline)
