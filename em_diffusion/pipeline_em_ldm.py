"""Latent diffusion for grey electron micrographs: one self-contained file, which travels with every saved pipeline."""

import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel, VQModel
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def _is_about_other_things(record: logging.LogRecord) -> bool:
    """Drop diffusers' word that VQModel ignores `latents_mean` and `latents_std`: this pipeline reads them."""
    message = record.getMessage()
    return not ("passed to VQModel" in message and "latents_mean" in message)


logging.getLogger("diffusers.configuration_utils").addFilter(_is_about_other_things)


class EMLatentDiffusionPipeline(DiffusionPipeline):
    """Generates 1-channel micrographs: noise -> denoised latents (U-Net) -> nearest codes -> image (VQ decoder).

    vqvae: a 1-channel `VQModel`. Its config holds `latents_mean` and `latents_std`, one number per latent channel, by which
        the denoiser's latents are put back into its own scale; without them, its `scaling_factor` alone.
    unet: an unconditional `UNet2DModel` over the latents [B, C, h, w].
    scheduler: `DDIMScheduler` as saved; any diffusers scheduler can take its place, as in
        `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.
    pixel_size_nm: side of a pixel of the generated images in nanometres; None if it is not known.
    """

    model_cpu_offload_seq = "unet->vqvae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self, vqvae: VQModel, unet: UNet2DModel, scheduler: SchedulerMixin, pixel_size_nm: float | None = None
    ):
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)
        self.register_to_config(pixel_size_nm=None if pixel_size_nm is None else float(pixel_size_nm))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ):
        """Generate `batch_size` images.

        generator: one for the batch, or a list of `batch_size`; with a list, image i depends on generator i alone.
        num_inference_steps: denoising steps.
        eta: noise added back in each step of DDIM, 0 (none) to 1 (as in DDPM); other schedulers do not take it.
        latents: the initial noise [B, C, h, w], of unit variance, instead of the generator's.
        output_type: "pil" (mode "L"), "np" (float32 [B, H, W, 1] in [0, 1]), "pt" (float32 [B, 1, H, W] in [0, 1]) or
            "latent" (float32 [B, C, h, w] in the autoencoder's scale, as `vqvae.decode` takes them).
        callback_on_step_end: called as f(pipe, step, timestep, {"latents": ...}) after each step; what it returns under
            "latents" takes their place.

        The noise and the scheduler's arithmetic are float32 whatever the type of the models.
        Returns `ImagePipelineOutput`, or a tuple of one with return_dict=False.
        """
        self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        latents = self._prepare_latents(batch_size, generator, latents, device)  # [B, C, h, w]
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        step_arguments = self._find_step_arguments(generator, eta)

        for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = latents
            if hasattr(self.scheduler, "scale_model_input"):
                model_input = self.scheduler.scale_model_input(latents, timestep)
            output = self.unet(model_input.to(self.unet.dtype), timestep).sample.float()  # [B, C, h, w]
            latents = self.scheduler.step(output, timestep, latents, **step_arguments).prev_sample
            if callback_on_step_end is not None:
                tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, i, timestep, tensors) or {}).get("latents", latents)

        latents = self.denormalise_latents(latents)
        images = latents if output_type == "latent" else self._convert(self.decode_latents(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def normalise_latents(self, latents):
        """Put encoder outputs [B, C, h, w] into the denoiser's scale: mean 0, deviation 1 in each channel; float32."""
        mean, std = self._find_latent_statistics(latents.device)
        return (latents.float() - mean) / std

    def denormalise_latents(self, latents):
        """Put the denoiser's latents [B, C, h, w] back into the autoencoder's scale; float32."""
        mean, std = self._find_latent_statistics(latents.device)
        return latents.float() * std + mean

    @torch.no_grad()
    def decode_latents(self, latents):
        """Decode latents [B, C, h, w] in the autoencoder's scale to float32 images [B, 1, H, W] in [-1, 1].

        The nearest code is searched in float32, since a narrower type would confuse near ones.
        """
        vectors = latents.float().movedim(1, -1)  # [B, h, w, C]
        codebook = self.vqvae.quantize.embedding.weight
        flat = vectors.reshape(-1, vectors.shape[-1])
        indices = [torch.cdist(part, codebook.float()).argmin(dim=1) for part in flat.split(2**14)]
        quantised = codebook[torch.cat(indices)].reshape(vectors.shape).movedim(-1, 1).contiguous()  # [B, C, h, w]
        images = self.vqvae.decode(quantised.to(self.vqvae.dtype), force_not_quantize=True).sample
        return images.float().clamp(-1, 1)

    def _find_latent_statistics(self, device):
        config = self.vqvae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return 0.0, 1.0 / config.scaling_factor
        shape = (1, -1, 1, 1)
        return torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape)

    def _prepare_latents(self, batch_size, generator, latents, device):
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has the shape {tuple(latents.shape)}; this pipeline starts from {shape}.")
        return latents.to(device, torch.float32)

    def _find_step_arguments(self, generator, eta):
        accepted = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in accepted:
            raise ValueError(f"{type(self.scheduler).__name__} takes no `eta`; leave it at 0 or use DDIMScheduler.")
        arguments = {"eta": eta, "generator": generator}
        return {name: value for name, value in arguments.items() if name in accepted}

    def _check_inputs(self, batch_size, generator, output_type, callback_tensor_inputs):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
        if isinstance(generator, list | tuple) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators for {batch_size} images; give one for each, or a single one."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f'`output_type` is "{output_type}"; choose one of {", ".join(OUTPUT_TYPES)}.')
        unknown = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}; only latents can be given.")

    def _convert(self, images, output_type):
        images = (images / 2 + 0.5).clamp(0, 1)  # [B, 1, H, W]
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 1]
        return images if output_type == "np" else self.numpy_to_pil(images)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Write model_index.json and this file beside it, so that the folder loads where our packages are absent.

        Folders on this machine from which components were loaded are not told to the world.
        """
        super().save_config(save_directory, push_to_hub=False, **kwargs)
        source, folder = Path(__file__), Path(save_directory)
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text())
        index["_class_name"] = [source.stem, type(self).__name__]
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path in [index_path, *(folder / name / "config.json" for name in self.components)]:
            if path.exists():
                config = json.loads(path.read_text())
                config.pop("_name_or_path", None)
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if source.resolve() != (folder / source.name).resolve():
            shutil.copyfile(source, folder / source.name)

    @classmethod
    def _dict_from_json_file(cls, *args, **kwargs):
        """Read an index as one of this very class: diffusers then runs the class at hand and not the folder's file."""
        index = super()._dict_from_json_file(*args, **kwargs)
        name = index.get("_class_name")
        name = name[-1] if isinstance(name, list | tuple) else name
        if name is not None and name != cls.__name__:
            raise ValueError(
                f"This is a {name}, not a {cls.__name__}; load it with its own class or DiffusionPipeline."
            )
        return {**index, "_class_name": name} if name is not None else index
