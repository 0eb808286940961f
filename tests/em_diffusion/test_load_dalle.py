"""DALL-E's dVAE from its two pickled networks: the numbers of a slow twin, and none of the classes
that the pickles name.
"""

import sys
import types

import pytest
import torch
from torch import nn

from em_diffusion.autoencoder import decode, encode, find_codes
from em_diffusion.em_dalle_vae import EMDalleVAE
from em_diffusion.load_autoencoder import KINDS, load_autoencoder
from em_diffusion.load_official import main
from em_diffusion.original.load import load_official
from support import official_twins as twins

CONFIG = {"n_hid": 8, "n_init": 6, "n_blk": 2, "vocab_size": 50, "channels": 3}


def build_module(weights, class_name):
    """A network of classes in a package `dall_e`, such as the originals are pickled as, with these
    parameters.
    """
    names = {"": class_name}
    modules = {}

    def find(path):
        if path not in modules:
            cls = getattr(sys.modules["dall_e.encoder"], names.get(path, "Block"))
            modules[path] = cls()
            modules[path].device, modules[path].n_hid = (
                torch.device("cpu"),
                2,
            )  # attributes as those of the originals
            if path:
                parent, _, name = path.rpartition(".")
                find(parent).add_module(name, modules[path])
        return modules[path]

    for name, tensor in weights.items():
        path, _, parameter = name.rpartition(".")
        find(path).register_parameter(parameter, nn.Parameter(tensor, requires_grad=False))
    find("blocks.group_1").add_module("pool", nn.MaxPool2d(2))
    return modules[""]


@pytest.fixture
def create(tmp_path, monkeypatch):
    def create(config=CONFIG, seed=0, whole=True, **options):
        halves = twins.random_dalle(config, seed)
        final = halves[1]["blocks.output.conv.w"]
        final -= final.mean(1, keepdim=True)  # so that some pixels are grey,
        final *= 3  # and some black or white
        folder = tmp_path / "dalle"
        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            module = types.ModuleType("dall_e.encoder")
            for name in ("Encoder", "Decoder", "Block"):
                setattr(module, name, type(name, (nn.Module,), {"__module__": "dall_e.encoder"}))
            patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
            patch.setitem(sys.modules, "dall_e.encoder", module)
            for name, weights in zip(("Encoder", "Decoder"), halves):
                contents = build_module(weights, name) if whole else weights
                torch.save(contents, folder / f"{name.lower()}.pkl", **options)
        return folder, *halves

    yield create
    assert "dall_e" not in sys.modules


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def error(value, expected):
    return float((value - expected).abs().max() / expected.std())


def twin_codes(encoder, config, images):
    logits = twins.dalle_encoder(encoder, config, 0.1 + 0.8 * (images + 1) / 2)
    return logits, logits.argmax(1)


def twin_images(decoder, config, codes):
    one_hot = (
        nn.functional.one_hot(codes, config["vocab_size"])
        .movedim(-1, 1)
        .to(next(iter(decoder.values())).dtype)
    )
    location = torch.sigmoid(twins.dalle_decoder(decoder, config, one_hot)[:, : config["channels"]])
    return 2 * ((location - 0.1) / 0.8).clamp(0, 1) - 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"whole": False}, {"whole": False, "_use_new_zipfile_serialization": False}],
    ids=str,
)
@pytest.mark.parametrize("changes", [{}, {"n_blk": 1, "channels": 1}])
def test_answers_as_the_twin(create, images, options, changes):
    config = CONFIG | changes
    folder, encoder, decoder = create(config, **options)
    model = load_official(folder, grey=False).double()
    encoder, decoder = (
        {name: tensor.double() for name, tensor in half.items()} for half in (encoder, decoder)
    )
    x = images[:, : config["channels"]].double()
    logits, codes = twin_codes(encoder, config, x)
    assert len(codes.unique()) > 1
    assert error(model.compute_logits(x), logits) < 1e-9
    latents = model.encode(x).latents
    found, _, (_, _, indices) = model.quantize(latents)
    assert torch.equal(indices.reshape(codes.shape), codes)
    assert torch.equal(found, latents)
    expected = twin_images(decoder, config, codes)
    assert (expected.abs() == 1).any()
    assert (expected.abs() < 1).double().mean() > 0.05
    for decoded in (
        model.decode(latents),
        model.decode(latents, force_not_quantize=True),
        model(x),
    ):
        assert (
            error(decoded.sample, expected) < 1e-6
        )  # a code and its bias are stored as their sum, in float32


@torch.no_grad()
def test_grey_is_repeat_and_average(create, images, tmp_path):
    folder, encoder, decoder = create()
    grey = images[:, :1]
    _, codes = twin_codes(encoder, CONFIG, grey.repeat(1, 3, 1, 1))
    expected = twin_images(decoder, CONFIG, codes).mean(1, keepdim=True)
    model = load_autoencoder(folder)
    assert (KINDS[type(model)], model.config.num_vq_embeddings) == ("dVAE", 50)
    latents = encode(model, grey)
    assert torch.equal(find_codes(model, latents), codes)
    assert error(decode(model, latents), expected) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    again = load_autoencoder(tmp_path / "saved")
    assert torch.equal(decode(again, encode(again, grey)), decode(model, latents))


@torch.no_grad()
def test_codes_are_found_from_latents_that_are_near(create, images):
    folder, _, _ = create()
    model = load_official(folder)
    latents = model.encode(images[:, :1]).latents
    noise = 1e-3 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model.decode(latents + noise).sample, model.decode(latents).sample)


def test_one_half_is_enough_to_find_the_other(create, tmp_path, monkeypatch):
    folder, _, _ = create()
    monkeypatch.setattr(
        "sys.argv", ["load_official", str(folder / "encoder.pkl"), str(tmp_path / "out")]
    )
    main()
    assert EMDalleVAE.from_pretrained(tmp_path / "out").config.in_channels == 1


def test_missing_swapped_and_foreign_halves(create, tmp_path):
    folder, _, _ = create()
    (folder / "decoder.pkl").rename(tmp_path / "decoder.pkl")
    with pytest.raises(ValueError, match=r"decoder\.pkl is missing"):
        load_official(folder)
    (folder / "decoder.pkl").write_bytes((folder / "encoder.pkl").read_bytes())
    with pytest.raises(ValueError, match="two halves of one dVAE"):
        load_official(folder)
    torch.save({"fc.weight": torch.ones(2)}, folder / "decoder.pkl")
    with pytest.raises(ValueError, match=r"decoder\.pkl is not a half"):
        load_official(folder)
    for contents in (nn.Module(), [1, 2], torch.ones(2), {"blocks.input.w": 3}):
        if isinstance(contents, nn.Module):
            contents.add_module("itself", contents)
        torch.save(contents, folder / "decoder.pkl")
        with pytest.raises(ValueError, match=r"decoder\.pkl is not a half"):
            load_official(folder)
    (folder / "decoder.pkl").write_bytes((folder / "encoder.pkl").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"decoder\.pkl cannot be read as a torch checkpoint"):
        load_official(folder)


def test_halves_of_two_networks(create, tmp_path):
    folder, _, _ = create(CONFIG | {"vocab_size": 40}, seed=3)
    decoder = (folder / "decoder.pkl").read_bytes()
    create()
    (folder / "decoder.pkl").write_bytes(decoder)
    with pytest.raises(ValueError, match="two halves of one dVAE"):
        load_official(folder)
