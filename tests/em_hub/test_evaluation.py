import pytest
import torch
from diffusers import VQModel

from em_data import DataConfig
from em_hub import evaluation
from em_hub.evaluation import EvaluationConfig, find_data, name_models, parse_pairs, reconstruct, refuse_other_splits
from em_hub.loading import RunInfo


def info(name="run", family="ldm", **changes):
    values = {"train_seconds": 1.0, "num_images_seen": 8, "data": {}, "config": {}, "folder": None}
    return RunInfo(name, family, **(values | changes))


@pytest.fixture
def runs(monkeypatch):
    infos = {
        "a/ldm": info("ldm", config={"data": "here", "tiles": {"resolution": 64, "split": "specimen"}}),
        "b/ldm": info("other", data={"name": "set", "split_hash": "1"}),
        "c/gan": info("gan", "stylegan2"),
    }
    monkeypatch.setattr(evaluation, "read_run_info", infos.__getitem__)
    return infos


def test_models_are_named_by_family_while_that_is_clear(runs):
    assert list(name_models(("a/ldm", "c/gan"))) == ["LDM", "StyleGAN2"]
    assert list(name_models(("a/ldm", "b/ldm", "c/gan"))) == ["ldm", "other", "StyleGAN2"]
    assert list(name_models(("mine=a/ldm", "c/gan"))) == ["mine", "StyleGAN2"]
    with pytest.raises(ValueError, match="two models are called x"):
        name_models(("x=a/ldm", "x=c/gan"))
    with pytest.raises(ValueError, match="no model was named"):
        name_models(())


def test_data_is_that_of_the_run_unless_flags_say_else(runs):
    models = name_models(("a/ldm", "c/gan"))
    config = EvaluationConfig(models=())
    assert find_data(config, models) == ("here", DataConfig(resolution=64, split="specimen"))
    config = EvaluationConfig(models=(), data="there", tiles=("resolution=32", "cache_dir=null", "intensity=full"))
    assert find_data(config, models) == ("there", DataConfig(resolution=32, split="specimen", intensity="full"))
    with pytest.raises(ValueError, match="--data FOLDER"):
        find_data(EvaluationConfig(models=()), name_models(("c/gan",)))
    with pytest.raises(ValueError, match="did you mean 'resolution'"):
        find_data(EvaluationConfig(models=(), tiles=("resolutoin=32",)), models)


def test_pairs_are_read_as_json_where_they_are_json():
    assert parse_pairs(("a=64", "b=true", "c=null", "d=paper", "e=[1, 2]")) == {
        "a": 64,
        "b": True,
        "c": None,
        "d": "paper",
        "e": [1, 2],
    }
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_pairs(("resolution",))


def test_a_model_of_another_split_is_refused(runs):
    models = name_models(("b/ldm",))
    refuse_other_splits(models, {"name": "set", "split_hash": "1"})
    with pytest.raises(ValueError, match="another split"):
        refuse_other_splits(models, {"name": "set", "split_hash": "2"})


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
