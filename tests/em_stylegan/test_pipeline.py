"""The pipeline's call, and its life as a folder that strangers load."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from em_data import to_uint8
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_training.saved_models import check_pipeline


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    generator = StyleGAN2Generator(
        16, z_dim=8, w_dim=8, mapping_depth=2, channel_base=128, max_channels=8
    ).eval()
    for block in generator.synthesis_network.blocks:
        torch.nn.init.constant_(block.conv1.noise_strength, 0.2)
    torch.nn.init.normal_(generator.mapping_network.w_mean)
    return EMStyleGANPipeline(generator, pixel_size_nm=0.5)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_output_types_agree(pipe):
    pt, array, pictures = (
        pipe(2, generator=seeds(0, 1), output_type=kind).images for kind in ("pt", "np", "pil")
    )
    assert pt.shape == (2, 1, 16, 16)
    assert array.shape == (2, 16, 16, 1)
    assert [picture.mode for picture in pictures] == ["L", "L"]
    np.testing.assert_array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    assert 0 <= array.min() < array.max() <= 1
    grey_levels = to_uint8(pt[:, 0] * 2 - 1)  # the one road gives the same grey levels
    np.testing.assert_array_equal(
        np.stack([np.asarray(picture) for picture in pictures]), grey_levels
    )


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_image_depends_on_its_generator_alone(pipe, noise_mode):
    together = pipe(3, generator=seeds(5, 6, 7), noise_mode=noise_mode, output_type="np").images
    alone = pipe(1, generator=seeds(7), noise_mode=noise_mode, output_type="np").images
    np.testing.assert_allclose(together[2], alone[0], atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 0.01


def test_noise_is_fresh_unless_latents_are_given(pipe):
    """Images drawn are as in training and as `generate.py` makes them; those of a walk share their
    noise.
    """
    drawn, random = (
        pipe(2, generator=seeds(0, 1), output_type="np", **mode).images
        for mode in ({}, {"noise_mode": "random"})
    )
    np.testing.assert_array_equal(drawn, random)
    latents = pipe(2, generator=seeds(0, 1), output_type="latent").images
    walk, const = (
        pipe(latents=latents, output_type="np", **mode).images
        for mode in ({}, {"noise_mode": "const"})
    )
    np.testing.assert_array_equal(walk, const)
    assert np.abs(walk - drawn).max() > 0.01


@pytest.fixture(scope="module")
def conditional():
    torch.manual_seed(0)
    generator = StyleGAN2Generator(
        16, z_dim=8, w_dim=8, mapping_depth=2, channel_base=128, max_channels=8, num_classes=3
    ).eval()
    return EMStyleGANPipeline(generator, id2label={2: "tin", 0: "iron", 1: "copper"})


def test_classes_by_number_and_name(conditional):
    assert conditional.labels == {"copper": 1, "iron": 0, "tin": 2}
    assert conditional.get_label_ids("tin") == [2]
    assert conditional.get_label_ids(["iron", "tin"]) == [0, 2]

    def draw(labels, count=2):
        return conditional(count, seeds(0, 1), class_labels=labels, output_type="np").images

    expected = draw([2, 1])
    for labels in (["tin", "copper"], ["tin", 1], torch.tensor([2, 1]), torch.eye(3)[[2, 1]]):
        np.testing.assert_array_equal(draw(labels), expected)
    np.testing.assert_array_equal(draw("iron"), draw([0, 0]))
    assert not np.array_equal(draw("iron"), draw("tin"))
    np.testing.assert_array_equal(draw(["tin", "copper"], count=None), expected)  # one for each


def test_a_generator_with_classes_draws_them_alike(conditional):
    rngs = seeds(*range(300))
    ws = conditional(300, rngs, output_type="latent").images[:, 0]
    rngs = seeds(*range(300))
    z = torch.cat([torch.randn(1, 8, generator=rng) for rng in rngs])
    labels = torch.cat([torch.randint(3, (1,), generator=rng) for rng in rngs])
    torch.testing.assert_close(ws, conditional.generator.mapping(z, labels)[:, 0])
    assert labels.bincount(minlength=3).min() > 70
    # of one generator, too; without any, from the global state
    for generator in (torch.Generator().manual_seed(0), None):
        assert len(conditional(5, generator, output_type="latent").images) == 5


@pytest.mark.parametrize(
    "labels",
    [
        "lead",
        ["tin", "lead"],
        3,
        -1,
        [0, 3],
        [0],
        [0, 1, 2],
        torch.zeros(2),
        torch.eye(3),
        [[0], [1]],
    ],
)
def test_a_wrong_class_is_refused_before_the_device_sees_it(conditional, labels, monkeypatch):
    def fail(*args):
        raise AssertionError("the model was called")

    monkeypatch.setattr(conditional.generator, "mapping", fail)
    rng = torch.Generator().manual_seed(0)
    state = rng.get_state()
    with pytest.raises(ValueError, match="class"):
        conditional(2, rng, class_labels=labels)
    assert torch.equal(rng.get_state(), state)


def test_names_of_classes_are_saved_and_checked(conditional, pipe, tmp_path):
    conditional.save_pretrained(tmp_path / "pipe")
    loaded = EMStyleGANPipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.labels == conditional.labels
    assert type(conditional)(**conditional.components).labels == conditional.labels
    assert EMStyleGANPipeline(conditional.generator, id2label=None).labels == {}
    with pytest.raises(ValueError, match="no class of this model"):
        pipe.get_label_ids("tin")
    with pytest.raises(ValueError, match="This model has no classes"):
        pipe(class_labels=0)
    for names in ({0: "a", 1: "b"}, {0: "a", 1: "a", 2: "b"}, {1: "a", 2: "b", 3: "c"}):
        with pytest.raises(ValueError, match="`id2label` is"):
            EMStyleGANPipeline(conditional.generator, id2label=names)
    index_path = tmp_path / "pipe" / "model_index.json"
    index = json.loads(index_path.read_text())
    for names in (["a"], {"0": "a", "2": "b"}, {"0": ""}, {"0": "a", "1": "a"}, {"0": 1}, "a"):
        index_path.write_text(json.dumps(index | {"id2label": names}))
        with pytest.raises(ValueError, match="id2label is"):
            check_pipeline(tmp_path / "pipe", EMStyleGANPipeline)


def test_one_generator_serves_a_batch(pipe):
    first, second = (
        pipe(2, generator=torch.Generator().manual_seed(3), output_type="np").images
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_latents_make_the_same_images(pipe):
    latents = pipe(2, generator=seeds(0, 1), truncation_psi=0.7, output_type="latent").images
    assert latents.shape == (2, pipe.generator.num_ws, 8)
    options = {"truncation_psi": 0.7, "output_type": "np"}
    expected = pipe(2, generator=seeds(0, 1), noise_mode="const", **options).images
    np.testing.assert_array_equal(pipe(latents=latents, output_type="np").images, expected)
    np.testing.assert_array_equal(pipe(latents=latents[:, 0], output_type="np").images, expected)


def test_truncation_draws_images_together(pipe):
    spread = [
        pipe(
            4, generator=seeds(0, 1, 2, 3), truncation_psi=psi, noise_mode="const", output_type="pt"
        )
        .images.var(dim=0)
        .mean()
        .item()
        for psi in (1.0, 0.5, 0.0)
    ]
    assert spread[0] > spread[1] > spread[2]
    assert spread[2] < 1e-12


def test_tuple_and_defaults(pipe):
    images = pipe(return_dict=False)
    assert isinstance(images, tuple)
    assert len(images[0]) == 1


def test_reduced_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    reduced = EMStyleGANPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert reduced.generator.dtype == torch.bfloat16
    images = reduced(2, generator=seeds(0, 1), output_type="np").images
    np.testing.assert_allclose(
        images, pipe(2, generator=seeds(0, 1), output_type="np").images, atol=0.1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "must be at least 1"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"noise_mode": "loud"}, "choose one of random, const, none"),
        ({"output_type": "tiff"}, "choose one of pil, np, pt, latent"),
        ({"latents": torch.zeros(1, 3, 8)}, r"give \[B, 6, 8\]"),
    ],
)
def test_mistakes_are_explained(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_installed_class_needs_no_trust_and_runs_no_code_of_the_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for path in (
        tmp_path / "pipeline_em_stylegan.py",
        tmp_path / "generator" / "em_stylegan2_generator.py",
    ):
        path.write_text("raise RuntimeError('this must not run')")
    loaded = EMStyleGANPipeline.from_pretrained(tmp_path)
    assert type(loaded.generator) is StyleGAN2Generator
    assert loaded.config.pixel_size_nm == 0.5
    expected = pipe(2, generator=seeds(0, 1), output_type="np").images
    np.testing.assert_array_equal(
        loaded(2, generator=seeds(0, 1), output_type="np").images, expected
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_loaded_weights_are_aligned_and_give_the_same_images_to_the_bit(pipe, tmp_path):
    """Kernels of some processors round differently where weights are not aligned to 64 bytes."""
    pipe.save_pretrained(tmp_path)
    loaded = EMStyleGANPipeline.from_pretrained(tmp_path)
    stranger = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(stranger).__module__.startswith("diffusers_modules.")
    unaligned = StyleGAN2Generator.from_pretrained(tmp_path / "generator")
    assert any(weight.data_ptr() % 64 for weight in unaligned.parameters())
    for other in (loaded, stranger, EMStyleGANPipeline(unaligned)):
        weights = other.generator.state_dict()
        assert all(tensor.data_ptr() % 64 == 0 for tensor in weights.values())
        for name, tensor in pipe.generator.state_dict().items():
            assert torch.equal(weights[name], tensor)
        for mode in ("random", "const"):
            images = [
                p(2, generator=seeds(0, 1), noise_mode=mode, output_type="pt").images
                for p in (pipe, other)
            ]
            assert torch.equal(*images)


def test_pickled_weights_are_neither_written_nor_read(pipe, tmp_path):
    for options in ({"safe_serialization": False}, {}):
        with pytest.raises(ValueError, match="safe_serialization is False"):
            pipe.save_pretrained(tmp_path, *([] if options else [False]), **options)
    assert not any(tmp_path.iterdir())
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors is False"):
        EMStyleGANPipeline.from_pretrained(tmp_path, use_safetensors=False)
    path = tmp_path / "generator" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    torch.save(pipe.generator.state_dict(), path.with_suffix(".bin"))
    with pytest.raises(OSError, match=r"no file named .*\.safetensors"):
        EMStyleGANPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"output_loading_info": True},
        {"device_map": "balanced"},
        {"dtype": {"default": torch.bfloat16}},
        {"pixel_size_nm": 2.0},
    ],
)
def test_options_of_pipelines_are_understood(pipe, tmp_path, options):
    pipe.save_pretrained(tmp_path)
    loaded = EMStyleGANPipeline.from_pretrained(tmp_path, **options)
    assert loaded.config.pixel_size_nm == options.get("pixel_size_nm", 0.5)
    assert loaded.generator.dtype == (torch.bfloat16 if "dtype" in options else torch.float32)


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_weights_that_diverged_are_refused(pipe, output_type):
    broken = copy.deepcopy(pipe.generator)
    layer = (
        broken.mapping_network.layers[0] if output_type == "latent" else broken.synthesis_network
    )
    next(layer.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"not finite.*diverged"):
        EMStyleGANPipeline(broken)(1, output_type=output_type)


def test_layerwise_casting_is_refused(pipe):
    with pytest.raises(NotImplementedError, match=r"to\(torch\.bfloat16\)"):
        pipe.generator.enable_layerwise_casting(storage_dtype=torch.bfloat16)


def test_unknown_generator_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "generator": ["os", "system"]}))
    with pytest.raises(ValueError, match=r"holds the generator os\.system"):
        EMStyleGANPipeline.from_pretrained(tmp_path)


def test_stranger_loads_the_folder_without_our_packages(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_em_stylegan", "EMStyleGANPipeline"]
    assert index["generator"] == ["em_stylegan2_generator", "StyleGAN2Generator"]
    script = Path(__file__).with_name("load_elsewhere.py").read_text()
    (tmp_path / "load_elsewhere.py").write_text(script)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    # -S and a path of the site-packages alone: an editable install of our packages stays out of
    # sight
    packages = [path for path in sys.path if path.endswith("site-packages")]
    program = (
        f"import sys, runpy; sys.path += {packages!r}; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0])"
    )
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        program,
        "load_elsewhere.py",
        str(tmp_path / "saved"),
        str(tmp_path),
    ]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    expected = pipe(2, generator=seeds(0, 1), output_type="np").images
    for name in ("first", "again"):
        np.testing.assert_allclose(np.load(tmp_path / f"images_{name}.npy"), expected, atol=1e-6)
