"""What users of any diffusers pipeline expect, asked of both of ours.

The expectations are those of diffusers' common pipeline tests. Left out, since ours take no prompt and have no text encoder:
encoded prompts, guidance (and its callbacks), num_images_per_prompt, IP adapters, LoRA and its fusing, FreeU, safety checkers,
and optional components (ours need all of theirs). `enable_sequential_cpu_offload`: diffusers' VQ models read their codebook
past the hooks. xformers, half precision and offloading to a real accelerator want a GPU. StyleGAN has one pass: no steps, so
no callback, no scheduler and no progress bar.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.utils import dynamic_modules_utils
from models import MAKERS, draw, make_ldm


@pytest.fixture(params=MAKERS)
def pipe(request):
    return MAKERS[request.param]()


@pytest.fixture(autouse=True)
def _own_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("how", ["own class", "DiffusionPipeline"])
def test_saved_and_loaded_is_the_same(pipe, how, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    options = {"trust_remote_code": True} if how == "DiffusionPipeline" else {}
    cls = DiffusionPipeline if options else type(pipe)
    loaded = cls.from_pretrained(tmp_path / "saved", **options)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(loaded, 0, 1), draw(pipe, 0, 1))
    assert loaded.components.keys() == pipe.components.keys()
    assert loaded.config.pixel_size_nm == 0.5
    assert not any(part.training for part in loaded.components.values() if isinstance(part, torch.nn.Module))


def test_a_pipeline_is_made_again_from_its_components(pipe):
    again = type(pipe)(**pipe.components)
    again.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3} if "scheduler" in pipe.components else {}
    np.testing.assert_array_equal(draw(again, 4, **options), draw(pipe, 4))
    piped = type(pipe).from_pipe(pipe)
    piped.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(piped, 4), draw(pipe, 4))
    assert piped.config.pixel_size_nm == 0.5


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches(pipe, batch_size):
    seeds = list(range(10, 10 + batch_size))
    batch = draw(pipe, *seeds)
    assert batch.shape == (batch_size, 16, 16, 1)
    assert batch.dtype == np.float32
    for image, seed in zip(batch, seeds, strict=True):
        np.testing.assert_allclose(draw(pipe, seed)[0], image, atol=1e-5)
    assert len(np.unique(batch.reshape(batch_size, -1), axis=0)) == batch_size


def test_a_dictionary_and_a_tuple_hold_the_same(pipe):
    options = {"generator": [torch.Generator().manual_seed(0)], "output_type": "np"}
    (images,) = pipe(1, return_dict=False, **options)
    options["generator"][0].manual_seed(0)
    np.testing.assert_array_equal(pipe(1, **options).images, images)


def test_output_types(pipe):
    def run(kind):
        return pipe(2, generator=[torch.Generator().manual_seed(i) for i in range(2)], output_type=kind).images

    array, tensor, pictures, latents = (run(kind) for kind in ("np", "pt", "pil", "latent"))
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (16, 16))] * 2
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), np.round(array[..., 0] * 255))
    assert latents.shape[0] == 2
    with pytest.raises(ValueError, match="output_type"):
        run("jpg")


@pytest.mark.parametrize("how", ["to", "dtype", "torch_dtype"])
def test_narrower_types(pipe, how, tmp_path):
    expected = draw(pipe, 0, 1)
    if how == "to":
        narrow = pipe.to(torch.bfloat16)
    else:
        pipe.save_pretrained(tmp_path)
        narrow = type(pipe).from_pretrained(tmp_path, **{how: torch.bfloat16})
        narrow.set_progress_bar_config(disable=True)
    assert narrow.dtype == torch.bfloat16
    images = draw(narrow, 0, 1)
    assert images.dtype == np.float32
    assert np.abs(images - expected).mean() < 0.05
    back = narrow.to(torch.float32)
    assert back.dtype == torch.float32
    assert back.to("cpu").device.type == "cpu"


def test_variants(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="bf16")
    loaded = type(pipe).from_pretrained(tmp_path, variant="bf16")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(loaded, 0), draw(pipe, 0))
    with pytest.raises((OSError, ValueError), match=r"diffusion_pytorch_model\.safetensors|no file|variant"):
        type(pipe).from_pretrained(tmp_path)


def test_offloading_brings_every_model_to_the_device_before_it_is_used(pipe, monkeypatch):
    """On the CPU as the device: the hooks are the accelerator's, the journey is none."""
    expected = draw(pipe, 0, 1)
    pipe.enable_model_cpu_offload(device="cpu")
    order, models = [], {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, part in models.items():
        hook, before = part._hf_hook, part._hf_hook.pre_forward
        monkeypatch.setattr(
            hook, "pre_forward", lambda *a, name=name, before=before, **k: order.append(name) or before(*a, **k)
        )
        used = {"unet": ["forward"], "vqvae": ["decode"], "generator": ["mapping", "synthesis"]}[name]
        for method in used:
            old = getattr(part, method)

            def spy(*arguments, old=old, name=name, **options):
                assert name in order, f"{name} was used before it was brought"
                return old(*arguments, **options)

            if method != "forward":
                monkeypatch.setattr(part, method, spy)
    np.testing.assert_allclose(draw(pipe, 0, 1), expected, atol=1e-6)
    assert [name for i, name in enumerate(order) if name not in order[:i]] == pipe.model_cpu_offload_seq.split("->")
    np.testing.assert_allclose(draw(pipe, 0, 1), expected, atol=1e-6)  # the hooks are put on again
    pipe.remove_all_hooks()
    np.testing.assert_allclose(draw(pipe, 0, 1), expected, atol=1e-6)


def test_the_index_is_that_of_a_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {"_class_name", "_diffusers_version", "pixel_size_nm", *pipe.components} <= set(index)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == set(pipe.components)


# ---------------------------------------------------------------- where there are steps


def test_callbacks_see_and_change_the_latents():
    pipe, seen = make_ldm(), []

    def look(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        seen.append((step, int(timestep), tensors["latents"].clone()))
        return tensors

    options = {"generator": [torch.Generator().manual_seed(0)], "output_type": "latent", "num_inference_steps": 4}
    latents = pipe(1, callback_on_step_end=look, **options).images
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    torch.testing.assert_close(pipe.denormalise_latents(seen[-1][2]), latents)

    def clear(pipeline, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else tensors

    zeros = pipe(1, callback_on_step_end=clear, **options).images
    torch.testing.assert_close(zeros, pipe.denormalise_latents(torch.zeros_like(latents)))
    with pytest.raises(ValueError, match="only latents can be given"):
        pipe(1, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["noise"])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_swapped_scheduler_is_saved_and_overridden_at_loading(scheduler, tmp_path):
    pipe = make_ldm()
    plain = draw(pipe, 0)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = draw(pipe, 0)
    assert np.abs(expected - plain).max() > 1e-4
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is scheduler
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(loaded, 0), expected)
    overridden = type(pipe).from_pretrained(tmp_path, scheduler=make_ldm().scheduler)
    overridden.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(overridden, 0), plain)


def test_the_progress_bar_counts_steps_and_can_be_silenced(capfd):
    pipe = make_ldm()
    draw(pipe, 0)
    assert "3/3" not in capfd.readouterr().err
    pipe.set_progress_bar_config(desc="drawing")
    draw(pipe, 0)
    err = capfd.readouterr().err
    assert "3/3" in err
    assert "drawing" in err
