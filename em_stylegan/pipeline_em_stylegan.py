"""StyleGAN for grey electron micrographs: one self-contained file, which travels with every saved pipeline."""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NOISE_MODES = ("random", "const", "none")
# module -> class, the components that this pipeline knows
GENERATORS = {
    "em_stylegan1_generator": "StyleGAN1Generator",
    "em_stylegan2_generator": "StyleGAN2Generator",
    "em_stylegan3_generator": "StyleGAN3Generator",
}


class EMStyleGANPipeline(DiffusionPipeline):
    """Generates 1-channel micrographs in one pass: z -> w (mapping) -> image (synthesis).

    generator: a `StyleGAN2Generator` or `StyleGAN3Generator`, or the 2019 `StyleGAN1Generator`.
    pixel_size_nm: side of a pixel of the generated images in nanometres; None if it is not known.
    """

    model_cpu_offload_seq = "generator"

    def __init__(self, generator: ModelMixin, pixel_size_nm: float | None = None):
        super().__init__()
        _read_source(type(getattr(generator, "_orig_mod", generator)))
        self.register_modules(generator=generator)
        self.register_to_config(
            pixel_size_nm=None if pixel_size_nm is None else float(pixel_size_nm)
        )

    # Copied from em_diffusion.pipeline_em_ldm.EMLatentDiffusionPipeline.__setattr__
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
        class_labels: torch.Tensor | list[int] | int | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Generate `batch_size` images.

        generator: one for the batch, or a list of `batch_size`; with a list, image i depends on generator i alone.
        truncation_psi: 1 for the whole distribution; towards 0, images are drawn to the mean one, in the first
            `truncation_cutoff` layers (all when None).
        noise_mode: "random" (drawn from `generator`, after z), "const" (the stored noise maps, the same in every image) or "none";
            None for "random", as in training, and "const" for given `latents`, where fresh noise would flicker from one to the next.
        class_labels: integers [B], one for all, or rows [B, classes] that weigh them, for a conditional generator.
        latents: w [B, num_ws, w_dim] or [B, w_dim] as "latent" gives them, instead of drawing z; `batch_size` and truncation
            then have no say.
        output_type: "pil" (mode "L"), "np" (float32 [B, H, W, 1] in [0, 1]), "pt" (float32 [B, 1, H, W] in [0, 1]) or "latent"
            (w of every layer, float32 [B, num_ws, w_dim], after truncation).

        Returns `ImagePipelineOutput`, or a tuple of one with return_dict=False. There are no steps and so no progress bar.
        """
        noise_mode = noise_mode or ("random" if latents is None else "const")
        self._check_inputs(
            batch_size, generator if latents is None else None, noise_mode, output_type
        )
        device, dtype = self._execution_device, self.generator.dtype
        _wake(self.generator)
        if latents is None:
            shape = (batch_size, self.generator.config.z_dim)
            z = randn_tensor(
                shape, generator=generator, device=device, dtype=torch.float32
            )  # [B, z_dim]
            ws = self.generator.mapping(
                z.to(dtype), class_labels, truncation_psi, truncation_cutoff
            )
        else:
            ws = self._prepare_latents(latents, generator).to(device, dtype)  # [B, num_ws, w_dim]
        if output_type == "latent":
            images = ws.float()
        else:
            images = self._convert(self.generator.synthesis(ws, noise_mode, generator), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(self, batch_size, generator, noise_mode, output_type):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
        if isinstance(generator, list | tuple) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators for {batch_size} images; give one for each, or a single one."
            )
        if noise_mode not in NOISE_MODES:
            raise ValueError(
                f'`noise_mode` is "{noise_mode}"; choose one of {", ".join(NOISE_MODES)}.'
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f'`output_type` is "{output_type}"; choose one of {", ".join(OUTPUT_TYPES)}.'
            )

    def _prepare_latents(self, latents, generator):
        num_ws, w_dim = self.generator.num_ws, self.generator.config.w_dim
        if latents.ndim == 2:
            latents = latents.unsqueeze(1).expand(-1, num_ws, -1)
        if tuple(latents.shape[1:]) != (num_ws, w_dim):
            raise ValueError(
                f"`latents` has the shape {tuple(latents.shape)}; give [B, {num_ws}, {w_dim}] or [B, {w_dim}]."
            )
        if isinstance(generator, list | tuple) and len(generator) != len(latents):
            raise ValueError(
                f"{len(generator)} generators for {len(latents)} latents; give one for each, or a single one."
            )
        return latents

    def _convert(self, images, output_type):
        images = (images.float() / 2 + 0.5).clamp(0, 1)  # [B, 1, H, W]
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 1]
        return images if output_type == "np" else self.numpy_to_pil(images)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Write model_index.json and the code beside it, so that the folder loads where our packages are absent.

        The index names the pipeline's file and the component's own, such as `generator/em_stylegan2_generator.py`.
        """
        super().save_config(save_directory, push_to_hub=False, **kwargs)
        folder = Path(save_directory)
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text())
        index["_class_name"] = _write_source(type(self), folder)
        index["generator"] = _write_source(
            type(getattr(self.generator, "_orig_mod", self.generator)), folder / "generator"
        )
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path in (index_path, folder / "generator" / "config.json"):
            if path.exists():  # folders on this machine are not told to the world
                config = json.loads(path.read_text())
                config.pop("_name_or_path", None)
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Make a pipeline of another one's components; options are those of `DiffusionPipeline.from_pipe`.

        diffusers takes over only models of exactly the class in the signature, and ours names what they have in common.
        """
        own = cls._get_signature_keys(cls)[0]
        return super().from_pipe(
            pipeline, **{k: v for k, v in pipeline.components.items() if k in own} | kwargs
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a folder or Hub repository. The installed class reads weights and numbers with the installed code alone: it runs
        no code from the repository and needs no `trust_remote_code`. Options are those of `ModelMixin.from_pretrained`,
        `generator` (a component in place of the stored one) and `pixel_size_nm`."""
        package = __name__.rpartition(".")[0]
        if (
            package != "em_stylegan"
        ):  # this file came with the repository, and so did the component's
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("trust_remote_code", None)
        for key in ("dtype", "torch_dtype"):  # diffusers takes one for each component, too
            if isinstance(kwargs.get(key), dict):
                kwargs[key] = kwargs[key].get(
                    "generator", kwargs[key].get("default", torch.float32)
                )
        hub_options = (
            "cache_dir",
            "force_download",
            "proxies",
            "token",
            "local_files_only",
            "revision",
        )
        index = cls.load_config(
            pretrained_model_name_or_path,
            **{name: kwargs[name] for name in hub_options if name in kwargs},
        )
        module, name = index.get("generator") or (None, None)
        if GENERATORS.get(module) != name or name is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds the generator {module}.{name}, which {cls.__name__} does not know; "
                f"known are {', '.join(GENERATORS.values())}."
            )
        pixel_size_nm = kwargs.pop("pixel_size_nm", index.get("pixel_size_nm"))
        generator = kwargs.pop("generator", None)
        if generator is None:
            component = getattr(importlib.import_module(f"{package}.{module}"), name)
            generator = component.from_pretrained(
                pretrained_model_name_or_path, subfolder="generator", **kwargs
            )
        pipeline = cls(generator=generator, pixel_size_nm=pixel_size_nm)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline


def _wake(model):
    """Bring an offloaded model to its device, as its `forward` would: for its other methods."""
    hook = getattr(model, "_hf_hook", None)
    if hasattr(hook, "pre_forward"):
        hook.pre_forward(model)


# Copied from em_diffusion.pipeline_em_ldm.align_weights
def align_weights(model):
    """Copy weights whose address is no multiple of 64 bytes to memory that is aligned; return `model`.

    safetensors loads tensors at any address. Some CPU kernels round differently there, so that a
    loaded model and the same model in memory would give images that differ in their last digits.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cpu
        if is_plain and tensor.layout == torch.strided and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def _read_source(cls):
    """The file that a class comes from: (name without suffix, content); the class keeps it from its first reading on.

    diffusers copies the files of all repositories into one folder and runs a second one of the same name over the first one's module:
    both would then run the second's functions and be saved with its code. So a class that came with a repository takes its module
    with it, under a name of its own, and removes the compiled file, which may be taken for that of a second one of the same size.
    """
    if "_source" in vars(cls):
        return cls._source
    module = sys.modules[cls.__module__]
    path = Path(inspect.getsourcefile(module))
    cls._source = (path.stem, path.read_bytes())
    if cls.__module__.startswith("diffusers_modules."):
        with contextlib.suppress(OSError):
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        sys.modules.pop(cls.__module__)
        cls.__module__ = f"{cls.__module__}_{hashlib.sha256(cls._source[1]).hexdigest()[:12]}"
        sys.modules[cls.__module__] = module
    return cls._source


def _write_source(cls, folder: Path):
    """Write the file that a class comes from into `folder`; return the file's name without its suffix and the class's name."""
    stem, content = _read_source(cls)
    path = folder / f"{stem}.py"
    if not path.is_file() or path.read_bytes() != content:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [stem, cls.__name__]


_read_source(EMStyleGANPipeline)
