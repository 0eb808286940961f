import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from PIL import Image

from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_hub.generation import GenerationConfig, generate_images
from em_hub.loading import find_pipeline_folder, load_pipeline, read_run_info
from em_stylegan.em_stylegan2_generator import StyleGAN2Generator
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline

ROOT = Path(__file__).parents[2]


def make_ldm(seed=0):
    torch.manual_seed(seed)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vqvae = VQModel(
        in_channels=1, out_channels=1, latent_channels=2, num_vq_embeddings=16, scaling_factor=1.0, **kinds, **blocks
    )
    vqvae.register_to_config(latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0])
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, in_channels=2, out_channels=2, **kinds, **blocks)
    return EMLatentDiffusionPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler(clip_sample=False))


def make_stylegan(seed=0):
    torch.manual_seed(seed)
    return EMStyleGANPipeline(
        generator=StyleGAN2Generator(resolution=16, z_dim=8, w_dim=8, mapping_depth=2, channel_base=64, max_channels=8)
    )


@pytest.fixture(scope="module", params=["ldm", "stylegan2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (make_ldm() if request.param == "ldm" else make_stylegan()).save_pretrained(folder)
    return str(folder)


def config_for(model, out, **changes):
    steps = {"num_inference_steps": 2} if "ldm" in Path(model).name else {}
    return replace(
        GenerationConfig(model=model, out=str(out), num_images=7, batch_size=3, precision="no", **steps), **changes
    )


def read(folder):
    return np.stack([np.asarray(Image.open(p), dtype=int) for p in sorted(Path(folder).glob("[0-9]*.png"))])


def test_images_depend_on_seed_and_number_alone(model, tmp_path):
    for name, changes in {"a": {}, "b": {"batch_size": 7}, "c": {"seed": 1}}.items():
        generate_images(config_for(model, tmp_path / name, **changes))
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert len(a) == 7
    assert np.abs(a - b).max() <= 1  # another batch size may round another way
    assert len(np.unique(a.reshape(7, -1), axis=0)) == 7
    assert not np.array_equal(a, c)


def test_a_second_start_fills_the_gaps_and_only_those(model, tmp_path):
    config = config_for(model, tmp_path)
    generate_images(config)
    before = read(tmp_path)
    (tmp_path / "000002.png").unlink()
    (tmp_path / "000006.png").unlink()
    kept = (tmp_path / "000001.png").stat().st_mtime_ns
    record = generate_images(config)
    assert np.abs(read(tmp_path) - before).max() <= 1
    assert (tmp_path / "000001.png").stat().st_mtime_ns == kept
    assert record["timed_images"] == 9
    assert record["num_images"] == 7
    assert record == json.loads((tmp_path / "generation.json").read_text())
    assert generate_images(replace(config, num_images=8))["num_images"] == len(read(tmp_path)) == 8


def test_two_processes_make_the_same_folder(model, tmp_path):
    config = config_for(model, tmp_path / "one", batch_size=4)
    generate_images(config)
    flags = [
        "--model",
        model,
        "--out",
        str(tmp_path / "two"),
        "--num-images",
        "7",
        "--batch-size",
        "4",
        "--precision",
        "no",
    ]
    if config.num_inference_steps:
        flags += ["--num-inference-steps", "2"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "generate.py",
        *flags,
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    assert np.abs(read(tmp_path / "one") - read(tmp_path / "two")).max() <= 1
    assert json.loads((tmp_path / "two" / "generation.json").read_text())["timed_images"] == 7


def test_a_folder_never_mixes_settings_or_models(model, tmp_path):
    config = config_for(model, tmp_path / "images")
    generate_images(config)
    with pytest.raises(ValueError, match=r"other settings \(seed differ\)"):
        generate_images(replace(config, seed=3))
    other = tmp_path / "other"
    (make_ldm(1) if "ldm" in Path(model).name else make_stylegan(1)).save_pretrained(other)
    with pytest.raises(ValueError, match="weights_sha256"):
        generate_images(replace(config, model=str(other)))
    stray = tmp_path / "stray"
    stray.mkdir()
    Image.new("L", (16, 16)).save(stray / "000000.png")
    with pytest.raises(ValueError, match="unknown origin"):
        generate_images(replace(config, out=str(stray)))


def test_sixteen_bit_tiff(model, tmp_path):
    import tifffile

    generate_images(config_for(model, tmp_path, num_images=2, format="tiff", bits=16))
    image = tifffile.imread(tmp_path / "000000.tif")
    assert image.dtype == np.uint16
    assert len(np.unique(image)) > 16


def test_another_scheduler_is_used(tmp_path):
    make_ldm().save_pretrained(tmp_path / "ldm")
    for scheduler in ("ddim", "dpm-solver++", "unipc", "euler", "ddpm"):
        config = GenerationConfig(
            model=str(tmp_path / "ldm"),
            out=str(tmp_path / scheduler),
            num_images=1,
            precision="no",
            num_inference_steps=3,
        )
        record = generate_images(replace(config, scheduler=scheduler))
        assert record["settings"]["scheduler"].lower().startswith(scheduler[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "at least 1"),
        ({"format": "gif"}, "png or tiff"),
        ({"bits": 12}, "8 or 16"),
        ({"precision": "fp8"}, "precision"),
        ({"scheduler": "magic"}, "dpm-solver"),
        ({"model": "runs/none"}, "no folder runs/none"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate_images(replace(GenerationConfig(model="x/y", out=str(tmp_path)), **changes))


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no finished model"):
        find_pipeline_folder(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30"}'
    )
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        load_pipeline(str(tmp_path))
    assert find_pipeline_folder("someone/em-ldm") is None
    assert read_run_info("someone/em-ldm").name == "em-ldm"
