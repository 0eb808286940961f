"""The published pipeline: what it takes, what it refuses, saved and loaded."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from em_cyclegan.em_resnet_generator import EMResnetGenerator
from em_cyclegan.pipeline_em_translation import EMTranslationPipeline
from em_training.em_grey_images import to_pixels


def make_pipeline(seed=0, both=True):
    torch.manual_seed(seed)
    generators = [EMResnetGenerator(4, 2).eval() for _ in range(2 if both else 1)]
    for generator in generators:  # as after a training: the output is far from grey
        torch.nn.init.normal_(generator.to_image.weight, std=0.3)
    return EMTranslationPipeline(*generators, pixel_size_nm=0.5)


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (16, 24), np.uint8)


def test_all_kinds_of_images_are_the_same(pipeline, image):
    expected = pipeline(image, output_type="np").images
    assert expected.shape == (1, 16, 24, 1)
    assert expected.dtype == np.float32
    assert 0 <= expected.min() < expected.max() <= 1
    floats = image.astype(np.float32) / 255
    wide = image.astype(np.uint16) * 257
    kinds = [
        Image.fromarray(image),
        [Image.fromarray(image)],
        Image.fromarray(wide),
        Image.fromarray(np.stack([image] * 3, axis=-1)),
        image[None],
        image[None, :, :, None],
        wide,
        floats,
        floats.astype(np.float64),
        torch.from_numpy(image),
        torch.from_numpy(floats),
        torch.from_numpy(floats)[None, None],
    ]
    for kind in kinds:
        images = pipeline(kind, output_type="np").images
        np.testing.assert_allclose(images, expected, atol=1e-5)


def test_output_types(pipeline, image):
    tensor = pipeline(image, output_type="pt").images
    assert tensor.shape == (1, 1, 16, 24)
    (picture,) = pipeline(image).images
    assert (picture.mode, picture.size) == ("L", (24, 16))
    np.testing.assert_allclose(np.asarray(picture) / 255, tensor[0, 0], atol=0.5 / 255 + 1e-6)
    (images,) = pipeline([image, image], output_type="np", return_dict=False)
    np.testing.assert_allclose(images[0], images[1], atol=1e-6)


def test_directions(pipeline, image):
    there, back = (
        pipeline(image, direction, output_type="pt").images for direction in ("a_to_b", "b_to_a")
    )
    assert (there - back).abs().max() > 0.01
    one_way = EMTranslationPipeline(pipeline.generator_a_to_b)
    assert torch.equal(one_way(image, output_type="pt").images, there)
    with pytest.raises(ValueError, match="from a to b only"):
        one_way(image, "b_to_a")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((15, 16), np.uint8), "15 x 16 pixels, but both sides must be multiples of 4"),
        (np.zeros((4, 16), np.uint8), "at least 8"),
        (np.zeros((0, 16), np.uint8), r"the shape \[0, 16\]"),
        (np.zeros((2, 16, 16, 3), np.uint8), "does not hold grey images"),
        (np.zeros(16, np.uint8), r"the shape \[16\]"),
        (np.zeros((16, 16), np.int64), "holds int64"),
        (np.zeros((16, 16), bool), "holds bool"),
        (np.full((16, 16), np.nan), "values from nan"),
        (np.full((16, 16), -0.5), r"values from -0.5 to -0.5, but floats must be in \[0, 1\]"),
        (np.full((16, 16), 255.0), "values from 255"),
        (torch.zeros(1, 3, 16, 16), "does not hold grey images"),
        (torch.zeros(16, 16, dtype=torch.complex64), "holds complex64"),
        ([], "empty list"),
        ([np.zeros((8, 8), np.uint8), np.zeros((8, 16), np.uint8)], r"sizes 8 x 8, 8 x 16"),
        ("image.png", "is a str"),
        (None, "is a NoneType"),
        (Image.new("RGB", (16, 16), (255, 0, 0)), 'Use image.convert\\("L"\\)'),
        (Image.new("F", (16, 16)), "the mode F"),
    ],
)
def test_impossible_images_are_refused(pipeline, image, message):
    with pytest.raises(ValueError, match=message):
        pipeline(image)


def test_impossible_arguments_are_refused(pipeline, image):
    with pytest.raises(ValueError, match='`direction` is "there"'):
        pipeline(image, "there")
    with pytest.raises(ValueError, match='`output_type` is "latent"'):
        pipeline(image, output_type="latent")
    broken = make_pipeline()
    broken.generator_a_to_b.to_image.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        broken(image)


def test_grey_levels_are_those_of_the_tiles():
    from em_data import from_uint

    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    torch.testing.assert_close(to_pixels(levels)[:, 0], from_uint(levels))


@pytest.mark.parametrize("both", [True, False])
def test_saved_and_loaded(image, tmp_path, both):
    pipeline = make_pipeline(both=both)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_em_translation", "EMTranslationPipeline"]
    assert index["generator_a_to_b"] == ["em_resnet_generator", "EMResnetGenerator"]
    assert (tmp_path / "generator_a_to_b" / "em_resnet_generator.py").is_file()
    loaded = EMTranslationPipeline.from_pretrained(tmp_path)
    assert loaded.config.pixel_size_nm == 0.5
    assert (loaded.generator_b_to_a is None) is not both
    expected = pipeline(image, output_type="pt").images
    assert torch.equal(loaded(image, output_type="pt").images, expected)
    again = EMTranslationPipeline(**loaded.components)
    assert again.config.pixel_size_nm == 0.5
    narrow = EMTranslationPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.generator_a_to_b.dtype == torch.bfloat16
    assert (narrow(image, output_type="pt").images - expected).abs().max() < 0.1
    with pytest.raises(ValueError, match="pickled weights"):
        pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="pickled weights"):
        EMTranslationPipeline.from_pretrained(tmp_path, use_safetensors=False)


def test_loaded_with_the_code_beside_it(pipeline, image, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "EMTranslationPipeline"
    assert not type(loaded).__module__.startswith("em_cyclegan")
    images = [each(image, "b_to_a", output_type="pt").images for each in (pipeline, loaded)]
    assert torch.equal(*images)


def test_a_foreign_generator_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text()) | {"generator_a_to_b": ["os", "system"]}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"os\.system, which this version"):
        EMTranslationPipeline.from_pretrained(tmp_path)
