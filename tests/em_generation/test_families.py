import json
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest
import torch
from diffusers import VQModel

from em_cyclegan.family import TranslationOptions
from em_diffusion.drawing import reconstruct
from em_diffusion.family import DEMO_STEPS, LDMOptions, SamplerName
from em_diffusion.mask_family import MaskLDMOptions
from em_diffusion.samplers import SAMPLERS
from em_generation.families import FAMILIES, find_family, make_options, read_family
from em_stable_diffusion.family import LoRAOptions
from em_stylegan.drawing import LAYER_GROUPS, find_layers
from em_stylegan.em_stylegan1_generator import StyleGAN1Generator
from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.family import LayerGroup, StyleGANOptions
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_training import seed_for
from support import models


def test_the_registry_imports_nothing_heavy():
    program = (
        "import sys, em_generation.families; print({'torch', 'diffusers'} & set(sys.modules), "
        "[m for m in sys.modules if m.startswith(('em_diffusion.', 'em_stylegan.'))])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == (
        "set() ['em_diffusion.family', 'em_diffusion.mask_family', 'em_stylegan.family']\n"
    ), result.stderr


def test_samplers_by_name_are_the_ones_there_are():
    assert get_args(SamplerName) == tuple(SAMPLERS) == tuple(DEMO_STEPS)


def test_thirds_of_the_layers_are_all_layers():
    assert get_args(LayerGroup) == LAYER_GROUPS
    for num_ws in (3, 8, 14):
        covered = [i for third in LAYER_GROUPS for i in range(*find_layers(num_ws, third))]
        assert covered == list(range(num_ws))


def make_small_stylegan(kind):
    small = {"z_dim": 8, "w_dim": 8, "mapping_depth": 2, "channel_base": 64, "max_channels": 8}
    if kind == "stylegan1":
        return StyleGAN1Generator(16, **small)
    return StyleGAN3Generator(16, **small, radial_filters=kind == "stylegan3-r")


@pytest.mark.parametrize(
    ("kind", "title"),
    [("stylegan1", "StyleGAN"), ("stylegan3-t", "StyleGAN3-T"), ("stylegan3-r", "StyleGAN3-R")],
)
def test_a_saved_pipeline_tells_its_kind(kind, title, tmp_path):
    EMStyleGANPipeline(make_small_stylegan(kind)).save_pretrained(tmp_path)
    family, found = read_family(tmp_path)
    assert (family.name, found, find_family(found).titles[found]) == ("stylegan", kind, title)


def test_an_unknown_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"unknown kind FluxPipeline; known are EMLatent"):
        read_family(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model_index\.json is damaged"):
        read_family(tmp_path)


@pytest.mark.parametrize("name", models.MAKERS)
def test_image_i_is_the_pipelines_own_of_its_seed(name):
    pipeline, family = models.MAKERS[name](), find_family(name)
    scheduler = getattr(pipeline, "scheduler", None)
    drawer = family.start(pipeline, family.options(), seed=3, batch_size=4)
    numbers = [2, 0, 7, 5]
    rngs = [torch.Generator().manual_seed(seed_for(3, i)) for i in numbers]
    expected = pipeline(4, generator=rngs, output_type="pt").images * 2 - 1
    drawn = drawer.draw(numbers)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    assert drawn.dtype == torch.float32
    assert getattr(pipeline, "scheduler", None) is scheduler
    assert json.loads(json.dumps(drawer.describe())) == drawer.describe()
    names = {field.name for field in fields(family.options)}
    assert {control.name for control in family.controls(pipeline)} <= names


def test_options_of_several_families_are_given_as_pairs():
    options = make_options(FAMILIES, ["truncation-psi=0.7", "grain=false"])
    assert options == {
        "ldm": LDMOptions(grain=False),
        "stylegan": StyleGANOptions(truncation_psi=0.7),
        "mask-ldm": MaskLDMOptions(grain=False),
        "cyclegan": TranslationOptions(),
        "lora": LoRAOptions(),
    }
    with pytest.raises(ValueError, match="--sampling has eta, but no model here has this option"):
        make_options([find_family("stylegan")], ["eta=1"])
    with pytest.raises(ValueError, match=r"--eta is 2\.0, but must be 0 to 1"):
        make_options(FAMILIES, ["eta=2"])
    with pytest.raises(ValueError, match=r"--sampling takes KEY=VALUE, such as eta=0\.5"):
        make_options(FAMILIES, ["eta"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LDMOptions(scheduler="magic"), "dpm-solver"),
        (lambda: LDMOptions(scheduler="ddim"), "needs --num-inference-steps"),
        (lambda: LDMOptions(num_inference_steps=0), "must be 1 to 65536"),
        (lambda: LDMOptions(decode_batch_size=0), "must be 1 to 65536"),
        (lambda: LDMOptions(eta=float("nan")), "--eta is nan"),
        (lambda: StyleGANOptions(truncation_psi=float("nan")), "--truncation-psi is nan"),
        (lambda: StyleGANOptions(mix_layers="all"), "coarse, middle, fine"),
    ],
)
def test_mistakes_in_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_latents_that_are_not_finite_are_refused():
    pipeline, family = models.make_ldm(), find_family("ldm")
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(float("nan"))
    drawer = family.start(pipeline, family.options(num_inference_steps=1))
    with pytest.raises(ValueError, match="model diverged"):
        drawer.draw([0])


def test_reconstruction_quantises():
    torch.manual_seed(0)
    vqvae = VQModel(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        num_vq_embeddings=4,
        block_out_channels=(8,),
        norm_num_groups=4,
    )
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        codes = vqvae.quantize(vqvae.encode(images).latents)[0]
        expected = vqvae.decode(codes, force_not_quantize=True).sample.clamp(-1, 1)
    torch.testing.assert_close(reconstruct(vqvae, images), expected)
