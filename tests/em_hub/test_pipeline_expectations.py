"""What users of any diffusers pipeline expect, asked of both of ours.

The expectations are those of diffusers' common pipeline tests, which its package does not hold;
`COMMON` lists them by name, with our test of each or the reason that it does not apply."""

import inspect
import io
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import ModelCard

from support.models import MAKERS, draw, make_ldm

PROMPT = "ours take no prompt and have no text encoder"
OFFLOADING = "test_offloading_brings_every_model_to_the_device_before_it_is_used"
GUIDANCE = "ours have no guidance"
STABLE_DIFFUSION = "a helper of Stable Diffusion's class, which ours are not"
ACCELERATOR = "wants an accelerator"
COMMON = {  # diffusers' test: ours, or why there is none
    "test_save_load_local": "test_saved_and_loaded_is_the_same",
    "test_pipeline_call_signature": "test_the_call_has_the_usual_arguments",
    "test_inference_batch_consistent": "test_batches",
    "test_inference_batch_single_identical": "test_batches",
    "test_dict_tuple_outputs_equivalent": "test_a_dictionary_and_a_tuple_hold_the_same",
    "test_components_function": "test_a_pipeline_is_made_again_from_its_components",
    "test_from_pipe_consistent_config": "test_a_pipeline_is_made_again_from_its_components",
    "test_from_pipe_consistent_forward_pass": "test_a_pipeline_is_made_again_from_its_components",
    "test_from_pipe_consistent_forward_pass_cpu_offload": ACCELERATOR,
    "test_to_device": "test_narrower_types",
    "test_to_dtype": "test_narrower_types",
    "test_torch_dtype_dict": "test_each_part_in_a_type_of_its_own",
    "test_float16_inference": f"{ACCELERATOR}; bfloat16 in its place: test_narrower_types",
    "test_save_load_float16": f"{ACCELERATOR}; bfloat16 in its place: test_narrower_types",
    "test_serialization_with_variants": "test_variants",
    "test_loading_with_variants": "test_variants",
    "test_loading_with_incorrect_variants_raises_error": "test_variants",
    "test_pt_np_pil_outputs_equivalent": "test_output_types",
    "test_pt_np_pil_inputs_equivalent": "ours take no image",
    "test_latents_input": "test_latents_come_out_and_go_in",
    "test_callback_inputs": "test_callbacks_see_and_change_the_latents",
    "test_callback_cfg": GUIDANCE,
    "test_cfg": GUIDANCE,
    "test_karras_schedulers_shape": "test_a_swapped_scheduler_is_saved_and_overridden_at_loading",
    "test_attention_slicing_forward_pass": "test_sliced_attention_changes_nothing",
    "test_layerwise_casting_inference": "test_a_denoiser_stored_in_eight_bits",
    "test_model_cpu_offload_forward_pass": OFFLOADING,
    "test_cpu_offload_forward_pass_twice": OFFLOADING,
    "test_sequential_cpu_offload_forward_pass": "diffusers' VQ models read their codebook past "
    "the hooks",
    "test_sequential_offload_forward_pass_twice": "diffusers' VQ models read their codebook past "
    "the hooks",
    "test_pipeline_with_accelerator_device_map": "test_loaded_onto_a_device",
    "test_calling_mco_raises_error_device_mapped_pipeline": f"{ACCELERATOR}, or two",
    "test_calling_to_raises_error_device_mapped_pipeline": f"{ACCELERATOR}, or two",
    "test_calling_sco_raises_error_device_mapped_pipeline": f"{ACCELERATOR}, or two",
    "test_group_offloading_inference": ACCELERATOR,
    "test_pipeline_level_group_offloading_inference": ACCELERATOR,
    "test_pipeline_level_group_offloading_sanity_checks": ACCELERATOR,
    "test_xformers_attention_forwardGenerator_pass": ACCELERATOR,
    "test_push_to_hub": "test_pushed_by_the_pipeline_itself",
    "test_push_to_hub_in_organization": "test_pushed_by_the_pipeline_itself",
    "test_push_to_hub_library_name": "test_pushed_by_the_pipeline_itself",
    "test_save_load_optional_components": "ours need all of their components",
    "test_save_load_dduf": "a DDUF archive may hold no code, and ours travel with theirs",
    "test_num_images_per_prompt": PROMPT,
    "test_encode_prompt_works_in_isolation": PROMPT,
    "test_ip_adapter": PROMPT,
    "test_ip_adapter_cfg": PROMPT,
    "test_ip_adapter_masks": PROMPT,
    "test_ip_adapter_faceid": PROMPT,
    "test_pipeline_signature": PROMPT,  # of an IP adapter's
    "test_StableDiffusionMixin_component": STABLE_DIFFUSION,
    "test_vae_slicing": STABLE_DIFFUSION,
    "test_vae_tiling": STABLE_DIFFUSION,
    "test_freeu": STABLE_DIFFUSION,
    "test_fused_qkv_projections": STABLE_DIFFUSION,
    "test_pyramid_attention_broadcast": "a cache between the steps of transformers, which ours "
    "are not",
    "test_fastercache_inference": "a cache between the steps of transformers, which ours are not",
    "test_first_block_cache_inference": "a cache between the steps of transformers, which ours "
    "are not",
}


def test_every_test_of_the_list_is_there():
    ours = {name for name in COMMON.values() if name.startswith("test_")}
    assert ours <= {name for name in globals() if name.startswith("test_")}
    assert not any(name in COMMON for name in globals())


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
    assert not any(
        part.training for part in loaded.components.values() if isinstance(part, torch.nn.Module)
    )


@pytest.mark.parametrize("how", ["made", "loaded", "loaded with its code"])
def test_a_pipeline_is_made_again_from_its_components(pipe, how, tmp_path):
    if how != "made":
        pipe.save_pretrained(tmp_path)
        cls = type(pipe) if how == "loaded" else DiffusionPipeline
        pipe = cls.from_pretrained(tmp_path, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
    again = type(pipe)(**pipe.components)
    piped = type(pipe).from_pipe(pipe)
    for each in (again, piped):
        each.set_progress_bar_config(disable=True)
        np.testing.assert_array_equal(draw(each, 4), draw(pipe, 4))
        assert {k: v for k, v in each.config.items() if k[0] != "_"} == {
            k: v for k, v in pipe.config.items() if k[0] != "_"
        }
        assert each.config.pixel_size_nm == 0.5


def test_options_of_a_pipeline_made_of_anothers_parts(pipe):
    """Given ones hold; the others are those of the pipeline whose components were asked for."""
    other = type(pipe)(**pipe.components, pixel_size_nm=2)
    assert other.config.pixel_size_nm == 2
    assert type(pipe)(**pipe.components).config.pixel_size_nm == 0.5
    assert type(pipe)(**other.components).config.pixel_size_nm == 2
    assert type(pipe)(**pipe.components, pixel_size_nm=None).config.pixel_size_nm is None
    if "guide" in pipe.components:  # a pipeline without a guide guides nothing
        unguided = type(pipe)(**pipe.components | {"guide": None})
        assert unguided.config.guidance_scale == 1
        assert unguided.config.default_num_inference_steps == 3


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
    images, *_ = pipe(1, return_dict=False, **options)  # masks follow where there are any
    options["generator"][0].manual_seed(0)
    np.testing.assert_array_equal(pipe(1, **options).images, images)


def test_output_types(pipe):
    def run(kind):
        return pipe(
            2, generator=[torch.Generator().manual_seed(i) for i in range(2)], output_type=kind
        ).images

    array, tensor, pictures, latents = (run(kind) for kind in ("np", "pt", "pil", "latent"))
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (16, 16))] * 2
    np.testing.assert_array_equal(
        np.stack([np.asarray(p) for p in pictures]), np.round(array[..., 0] * 255)
    )
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
    with pytest.raises(
        (OSError, ValueError), match=r"diffusion_pytorch_model\.safetensors|no file|variant"
    ):
        type(pipe).from_pretrained(tmp_path)


def test_offloading_brings_every_model_to_the_device_before_it_is_used(pipe, monkeypatch):
    """On the CPU as the device: the hooks are the accelerator's, the journey is none."""
    expected = draw(pipe, 0, 1)
    pipe.enable_model_cpu_offload(device="cpu")
    order, models = (
        [],
        {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)},
    )
    for name, part in models.items():
        hook, before = part._hf_hook, part._hf_hook.pre_forward
        monkeypatch.setattr(
            hook,
            "pre_forward",
            lambda *a, name=name, before=before, **k: order.append(name) or before(*a, **k),
        )
        used = {
            "unet": ["forward"],
            "guide": ["forward"],
            "vqvae": ["decode"],
            "grain": ["forward"],
            "generator": ["mapping", "synthesis"],
            "layout_sampler": ["sample"],
        }[name]
        for method in used:
            old = getattr(part, method)

            def spy(*arguments, old=old, name=name, **options):
                assert name in order, f"{name} was used before it was brought"
                return old(*arguments, **options)

            if method != "forward":
                monkeypatch.setattr(part, method, spy)
    np.testing.assert_allclose(draw(pipe, 0, 1), expected, atol=1e-6)
    # the guide has no place in the sequence: unet and guide take turns, and both stay
    first_uses = [name for name in dict.fromkeys(order) if name != "guide"]
    assert first_uses == pipe.model_cpu_offload_seq.split("->")
    np.testing.assert_allclose(draw(pipe, 0, 1), expected, atol=1e-6)  # the hooks are put on again
    pipe.remove_all_hooks()
    np.testing.assert_allclose(draw(pipe, 0, 1), expected, atol=1e-6)


def test_the_index_is_that_of_a_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {"_class_name", "_diffusers_version", "pixel_size_nm", *pipe.components} <= set(index)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == set(pipe.components)


def test_the_call_has_the_usual_arguments(pipe):
    known = set(inspect.signature(type(pipe).__call__).parameters)
    assert {"batch_size", "generator", "output_type", "return_dict", "latents"} <= known
    steps = {"num_inference_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    assert steps & known == (steps if "scheduler" in pipe.components else set())


def test_each_part_in_a_type_of_its_own(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    names = [name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    for name in names:
        loaded = type(pipe).from_pretrained(
            tmp_path, dtype={name: torch.bfloat16, "default": torch.float16}
        )
        assert {each: loaded.components[each].dtype for each in names} == {
            each: torch.bfloat16 if each == name else torch.float16 for each in names
        }
        loaded = type(pipe).from_pretrained(tmp_path, dtype={name: torch.bfloat16})
        loaded.set_progress_bar_config(disable=True)
        dtypes = {each: torch.bfloat16 if each == name else torch.float32 for each in names}
        assert {each: loaded.components[each].dtype for each in names} == dtypes
        assert np.abs(draw(loaded, 0, 1) - draw(pipe, 0, 1)).mean() < 0.05


def test_loaded_onto_a_device(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, device_map="cpu")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(loaded, 0, 1), draw(pipe, 0, 1))


def test_latents_come_out_and_go_in(pipe):
    """StyleGAN's are the styles, which make the image with the stored noise; the LDM's are the
    noise that it starts from.
    """
    if "scheduler" in pipe.components:
        noise = torch.cat(
            [torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        )
        options = {"add_grain": False}
        if "layout_sampler" in pipe.components:  # layouts are drawn before the noise
            options["mask"] = torch.ones(1, 2, 16, 16)
        given = pipe(2, latents=noise, output_type="np", **options).images
        other = pipe(2, latents=-noise, output_type="np", **options).images
        np.testing.assert_array_equal(given, draw(pipe, 0, 1, **options))
    else:
        styles = pipe(
            2, generator=[torch.Generator().manual_seed(i) for i in range(2)], output_type="latent"
        ).images
        given = pipe(2, latents=styles, output_type="np").images
        other = pipe(2, latents=-styles, output_type="np").images
        np.testing.assert_array_equal(given, draw(pipe, 0, 1, noise_mode="const"))
    assert not np.array_equal(given, other)


def test_sliced_attention_changes_nothing(pipe):
    expected = draw(pipe, 0, 1)
    for size in (1, 2, "auto"):
        pipe.enable_attention_slicing(size)
        np.testing.assert_allclose(draw(pipe, 0, 1), expected, atol=1e-5)
    pipe.disable_attention_slicing()
    np.testing.assert_array_equal(draw(pipe, 0, 1), expected)


def test_a_denoiser_stored_in_eight_bits():
    pipe = make_ldm()
    expected = draw(pipe, 0, 1)
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in pipe.unet.parameters())
    images = draw(pipe, 0, 1)
    assert np.isfinite(images).all()
    assert 0 < np.abs(images - expected).mean() < 0.1


def test_an_absent_variant_and_pickles_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant="):
        type(pipe).from_pretrained(tmp_path / "whole", variant="fp16")
    with pytest.raises(ValueError, match="use_safetensors is False"):
        type(pipe).from_pretrained(tmp_path / "whole", use_safetensors=False)
    for part in pipe.components.values():
        if type(part).__module__.startswith("em_") and isinstance(part, torch.nn.Module):
            with pytest.raises(ValueError, match="safe_serialization is False"):
                part.save_pretrained(tmp_path / "part", safe_serialization=False)
    assert not (tmp_path / "part").exists()


def test_parts_of_a_repositorys_own_code_can_be_pickled(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    for name, part in loaded.components.items():
        if isinstance(part, torch.nn.Module):
            buffer = io.BytesIO()
            torch.save(part, buffer)
            buffer.seek(0)
            again = torch.load(buffer, weights_only=False)
            assert type(again) is type(part), name
            for key, tensor in part.state_dict().items():
                assert torch.equal(again.state_dict()[key], tensor)


def test_forms_of_a_generators_output():
    generator = MAKERS["stylegan"]().generator
    z = torch.randn(1, 8)
    images = generator(z, noise_mode="const")
    assert torch.equal(generator(z, noise_mode="const", return_dict=True).sample, images)
    (image,) = generator(z, noise_mode="const", return_dict=False)
    assert torch.equal(image, images)


def test_grain_refuses_layerwise_casting():
    with pytest.raises(NotImplementedError, match="no effect on this network"):
        make_ldm().grain.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("repo", ["you/pushed", "lab/pushed"])
def test_pushed_by_the_pipeline_itself(pipe, repo, hub):
    pipe.push_to_hub(repo)
    card = ModelCard(hub.read(repo, "README.md").decode())
    assert card.data.library_name == "diffusers"
    loaded = type(pipe).from_pretrained(repo)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(loaded, 0, 1), draw(pipe, 0, 1))


# ---------------------------------------------------------------- where there are steps


def test_callbacks_see_and_change_the_latents():
    pipe, seen = make_ldm(), []

    def look(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        seen.append((step, int(timestep), tensors["latents"].clone()))
        return tensors

    options = {
        "generator": [torch.Generator().manual_seed(0)],
        "output_type": "latent",
        "num_inference_steps": 4,
    }
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
