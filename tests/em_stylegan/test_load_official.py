"""Networks read from official pickles give the numbers of the original networks; nothing in a pickle is ever run."""

import bz2
import gzip
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.interpolate import load_generator
from em_stylegan.load_official import main
from em_stylegan.losses import path_lengths, r1_penalty
from em_stylegan.original.networks import discriminator_from_official, generator_from_official
from em_stylegan.original.reader import OfficialUnpickler, read_pickle

FOLDER = (
    Path(os.environ.get("EM_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))
    / "official_stylegan"
)
FIXTURE = FOLDER / "sg2_r32_ch1_c0_map8"
needs_fixture = pytest.mark.skipif(
    not FIXTURE.with_suffix(".pkl").exists(),
    reason=f"{FIXTURE}.pkl is not here (EM_FIXTURES names the fixtures' folder)",
)


@pytest.fixture(scope="module")
def numbers():
    return {
        name: torch.from_numpy(value)
        for name, value in np.load(FIXTURE.with_suffix(".npz")).items()
    }


@pytest.fixture(scope="module")
def stored():
    return read_pickle(FIXTURE.with_suffix(".pkl"))


@pytest.fixture(scope="module")
def generator(stored):
    return generator_from_official(stored["G_ema"])


@pytest.fixture(scope="module")
def discriminator(stored):
    return discriminator_from_official(stored["D"])


def assert_agrees(value, expected):
    """To 1e-5 of the output's deviation."""
    error = (value.detach() - expected).abs().max() / expected.std()
    assert error < 1e-5, f"off by {error:.1e} of the deviation"


@needs_fixture
@pytest.mark.parametrize(
    ("name", "psi", "cutoff"),
    [("ws", 1.0, None), ("ws_psi0.5", 0.5, None), ("ws_psi0.7_cut3", 0.7, 3)],
)
def test_mapping_and_truncation(generator, numbers, name, psi, cutoff):
    assert_agrees(generator.mapping(numbers["z"], None, psi, cutoff), numbers[name])


@needs_fixture
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("img_const_psi1", {"noise_mode": "const"}),
        ("img_const_psi0.7", {"noise_mode": "const", "truncation_psi": 0.7}),
        (
            "img_const_psi0.7_cut3",
            {"noise_mode": "const", "truncation_psi": 0.7, "truncation_cutoff": 3},
        ),
        ("img_none_psi1", {"noise_mode": "none"}),
    ],
)
def test_images(generator, numbers, name, options):
    assert_agrees(generator(numbers["z"], **options), numbers[name])


@needs_fixture
def test_style_mixing(generator, numbers):
    assert_agrees(
        generator.synthesis(numbers["ws_mixed"], noise_mode="const"), numbers["img_mixed"]
    )


@needs_fixture
def test_generator_that_is_not_averaged(stored, numbers):
    generator = generator_from_official(stored["G"])
    assert_agrees(generator(numbers["z"], noise_mode="const"), numbers["img_G_const_psi1"])


@needs_fixture
@pytest.mark.parametrize(
    ("images", "count", "logits"),
    [("D_img", 8, "D_logits"), ("D_img", 4, "D_logits_b4"), ("img_const_psi1", 4, "D_logits_fake")],
)
def test_logits(discriminator, numbers, images, count, logits):
    assert_agrees(discriminator(numbers[images][:count]), numbers[logits])


@needs_fixture
def test_r1(discriminator, numbers):
    images = numbers["D_img"][:4].clone().requires_grad_()
    logits = discriminator(images)
    assert_agrees(
        torch.autograd.grad(logits.sum(), images, retain_graph=True)[0], numbers["r1_grads"]
    )
    assert_agrees(r1_penalty(logits, images), numbers["r1_penalty"])


@needs_fixture
def test_path_lengths(generator, numbers):
    ws = numbers["ws"].clone().requires_grad_()
    images = generator.synthesis(ws, noise_mode="const")
    gradient = torch.autograd.grad((images * numbers["pl_noise"]).sum(), ws, retain_graph=True)[0]
    assert_agrees(gradient, numbers["pl_grads"])
    unit_noise = (
        numbers["pl_noise"] * images.shape[2]
    )  # the stored noise is already divided by the square root of the pixels
    assert_agrees(path_lengths(images, ws, unit_noise), numbers["pl_lengths"])


FIXTURE_3 = FOLDER / "sg3t_r32_ch1_c0_map2"
needs_fixture_3 = pytest.mark.skipif(
    not FIXTURE_3.with_suffix(".pkl").exists(), reason=f"{FIXTURE_3}.pkl is not here"
)


@pytest.fixture(scope="module")
def numbers_3():
    return {
        name: torch.from_numpy(value)
        for name, value in np.load(FIXTURE_3.with_suffix(".npz")).items()
    }


@pytest.fixture(scope="module")
def stored_3():
    return read_pickle(FIXTURE_3.with_suffix(".pkl"))


@pytest.fixture(scope="module")
def generator_3(stored_3):
    return generator_from_official(stored_3["G_ema"])


@needs_fixture_3
@pytest.mark.parametrize("dense", [True, False], ids=["matrices", "convolutions"])
def test_alias_free_generator(stored_3, numbers_3, monkeypatch, dense):
    if not dense:
        monkeypatch.setattr("em_stylegan.em_stylegan3_generator.DENSE_SIZE", 0)
    generator = generator_from_official(stored_3["G_ema"])
    assert isinstance(generator, StyleGAN3Generator)
    assert all(layer.activation.dense == dense for layer in generator.synthesis_network.layers)
    z = numbers_3["z"]
    for name, psi, cutoff in (
        ("ws", 1.0, None),
        ("ws_psi0.5", 0.5, None),
        ("ws_psi0.7_cut3", 0.7, 3),
    ):
        assert_agrees(generator.mapping(z, None, psi, cutoff), numbers_3[name])
    for name, options in (
        ("img_const_psi1", {"noise_mode": "const"}),
        ("img_const_psi0.7", {"truncation_psi": 0.7}),
        ("img_const_psi0.7_cut3", {"truncation_psi": 0.7, "truncation_cutoff": 3}),
        ("img_none_psi1", {"noise_mode": "none"}),
    ):
        assert_agrees(generator(z, **options), numbers_3[name])
    assert_agrees(generator.synthesis(numbers_3["ws_mixed"]), numbers_3["img_mixed"])
    assert_agrees(generator_from_official(stored_3["G"])(z), numbers_3["img_G_const_psi1"])


@needs_fixture_3
def test_alias_free_path_lengths_and_its_discriminator(generator_3, stored_3, numbers_3):
    ws = numbers_3["ws"].clone().requires_grad_()
    images = generator_3.synthesis(ws)
    gradient = torch.autograd.grad((images * numbers_3["pl_noise"]).sum(), ws, retain_graph=True)[0]
    # a float32 gradient depends on the order in which a processor sums: single entries of the stored
    # one are 9e-5 from float64, the root mean square is 7e-6
    deviation = (gradient - numbers_3["pl_grads"]).square().mean().sqrt()
    assert deviation / numbers_3["pl_grads"].std() < 1e-5
    assert_agrees(
        path_lengths(images, ws, numbers_3["pl_noise"] * images.shape[2]), numbers_3["pl_lengths"]
    )
    discriminator = discriminator_from_official(stored_3["D"])
    for images, count, logits in (
        ("D_img", 8, "D_logits"),
        ("D_img", 4, "D_logits_b4"),
        ("img_const_psi1", 4, "D_logits_fake"),
    ):
        assert_agrees(discriminator(numbers_3[images][:count]), numbers_3[logits])
    images = numbers_3["D_img"][:4].clone().requires_grad_()
    logits = discriminator(images)
    assert_agrees(
        torch.autograd.grad(logits.sum(), images, retain_graph=True)[0], numbers_3["r1_grads"]
    )
    assert_agrees(r1_penalty(logits, images), numbers_3["r1_penalty"])


@needs_fixture
def test_command_writes_networks_that_load(tmp_path, monkeypatch, numbers, capsys):
    from em_stylegan.em_stylegan2_generator import StyleGAN2Generator

    monkeypatch.setattr(
        "sys.argv", ["load_official", str(FIXTURE.with_suffix(".pkl")), str(tmp_path)]
    )
    main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["D", "G", "G_ema", "pipeline"]
    for generator in (
        StyleGAN2Generator.from_pretrained(tmp_path / "G_ema"),
        load_generator(tmp_path),
    ):
        with torch.no_grad():
            assert_agrees(generator(numbers["z"], noise_mode="const"), numbers["img_const_psi1"])


@needs_fixture
def test_truncated_file(tmp_path):
    path = tmp_path / "short.pkl"
    path.write_bytes(FIXTURE.with_suffix(".pkl").read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"short\.pkl is not a StyleGAN pickle"):
        read_pickle(path)


@needs_fixture
def test_another_kind_of_network(stored):
    with pytest.raises(ValueError, match="is a Discriminator, not"):
        generator_from_official(stored["D"])
    with pytest.raises(ValueError, match="is a Generator, not"):
        discriminator_from_official(stored["G"])


class Call:
    """Pickles as the call function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, getattr, __import__, open],
    ids=lambda function: function.__name__,
)
def test_malicious_pickle_runs_nothing(tmp_path, function):
    target = tmp_path / "target"
    argument = {os.system: f"touch {target}", open: str(target)}.get(
        function, f"open({str(target)!r}, 'w')"
    )
    arguments = (argument, "w") if function in (open, getattr) else (argument,)
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"G": Call(function, *arguments)}))
    with pytest.raises(ValueError, match="which is no part of a StyleGAN pickle"):
        read_pickle(path)
    assert not target.exists()


@pytest.mark.parametrize("dotted", ["OrderedDict.__init__", "OrderedDict.__class__", "abc.sys"])
def test_attributes_of_what_is_allowed_are_refused(tmp_path, dotted):
    path = tmp_path / "dotted.pkl"
    path.write_bytes(
        b"\x80\x04\x8c\x0bcollections\x8c" + bytes([len(dotted)]) + dotted.encode() + b"\x93."
    )
    with pytest.raises(ValueError, match="which is no part"):
        read_pickle(path)


def test_pickle_cannot_alter_its_reader(tmp_path):
    # GLOBAL torch._utils._rebuild_tensor_v2, then BUILD on it with a state of attributes to set
    for state in (b"}\x8c\x09_functionK\x01s", b"N}\x8c\x09_functionK\x01s\x86"):
        path = tmp_path / "build.pkl"
        path.write_bytes(
            b"\x80\x04\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93" + state + b"b."
        )
        with pytest.raises(ValueError, match="may not alter its reader"):
            read_pickle(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.mkdir(), "is a folder; give the pickle's file"),
        (lambda path: path.write_bytes(gzip.compress(b"N.")), "is packed with gzip: unpack it"),
        (lambda path: path.write_bytes(bz2.compress(b"N.")), "is packed with bzip2: unpack it"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "is a zip archive"),
        (
            lambda path: torch.save({"G": torch.ones(1)}, path),
            "is a zip archive.*no official StyleGAN's",
        ),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html>"), "is a web page"),
        (
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "git lfs pull",
        ),
        (
            lambda path: path.write_bytes(pickle.dumps({"a": 1})),
            r"expected a dictionary.*network-snapshot-\*\.pkl",
        ),
        (
            lambda path: path.write_bytes(b"\x80\x04" + network(text("Generator")) + b"."),
            r"a Generator on its own: .* as \{'G_ema': network\}",
        ),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, write, message):
    write(tmp_path / "a.pkl")
    with pytest.raises(ValueError, match=rf"a\.pkl .*{message}|a\.pkl {message}"):
        read_pickle(tmp_path / "a.pkl")


def test_tensorflow_pickle_is_named(tmp_path):
    path = tmp_path / "old.pkl"
    path.write_bytes(b"cdnnlib.tflib.network\nNetwork\n.")
    with pytest.raises(ValueError, match="TensorFlow-era"):
        read_pickle(path)


class Tensor:
    """Pickles as a tensor of `size` numbers in a storage of four."""

    def __init__(self, size):
        self.size = size

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (
            torch.arange(4.0)._typed_storage(),
            1,
            (self.size,),
            (1,),
            False,
            None,
        )


def test_tensors_are_read_and_stay_within_their_storage(tmp_path):
    path = tmp_path / "tensors.pkl"
    path.write_bytes(pickle.dumps({"a": Tensor(3)}))
    with path.open("rb") as file:
        assert OfficialUnpickler(file).load()["a"].read().tolist() == [1, 2, 3]
    path.write_bytes(pickle.dumps({"a": Tensor(4)}))
    with pytest.raises(ValueError, match="reaches beyond its storage"):
        read_pickle(path)


def test_numbers_and_containers_are_read(tmp_path):
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps({"a": np.float64(0.25), "b": [1, (2.0, None)]}))
    with path.open("rb") as file:
        assert OfficialUnpickler(file).load() == {"a": 0.25, "b": [1, (2.0, None)]}
    with pytest.raises(ValueError, match="holds no network"):
        read_pickle(path)


BOMB = (
    b")" + b"2\x86" * 60
)  # (), then each tuple twice in the next: hashing or printing it takes 2^60 steps


def text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


def call(module, name, *arguments):
    return text(module) + text(name) + b"\x93(" + b"".join(arguments) + b"tR"


def network(name, state=b"}"):
    meta = b"}(" + text("class_name") + name + text("state") + state + b"u"
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def storage_of(*instructions):
    """A storage, as a file of its own that ends in these instructions."""
    header = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    data = (
        header + b"\x80\x04" + b"".join(instructions) + b"." + pickle.dumps([], 2)
    )  # no storages follow
    return call("torch.storage", "_load_from_bytes", b"B" + len(data).to_bytes(4, "little") + data)


_DATA = torch.arange(4.0)._typed_storage().__reduce__()[1][0]
STORAGE = call("torch.storage", "_load_from_bytes", b"B" + len(_DATA).to_bytes(4, "little") + _DATA)
HANGS = {
    "key": b"}" + BOMB + b"Ns",
    "class name": network(BOMB),
    "key in a storage": storage_of(b"}" + BOMB + b"Ns"),
    "architecture": b"}"
    + text("G")
    + network(text("Generator"), b"}" + text("_modules") + BOMB + b"s")
    + b"s",
}
READ = """
import sys
from em_stylegan.original.networks import generator_from_official
from em_stylegan.original.reader import read_pickle
for path in sys.argv[1:]:
    try:
        generator_from_official(read_pickle(path)["G"])
    except ValueError as error:
        print(error, flush=True)
"""


def test_nested_tuples_do_not_hang_the_reader(tmp_path):
    paths = [tmp_path / f"{name}.pkl" for name in HANGS]
    for path, instructions in zip(paths, HANGS.values(), strict=True):
        path.write_bytes(b"\x80\x04" + instructions + b".")
    # in another process: what hashes such a tuple cannot be interrupted
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths], capture_output=True, text=True, timeout=120
    )
    answers = done.stdout.splitlines()
    assert len(answers) == len(HANGS), done.stderr
    assert "a dictionary or set with a tuple as a key" in answers[0]
    assert "malformed object" in answers[1]
    assert "a dictionary or set with a tuple as a key" in answers[2]
    assert "has not the parts of StyleGAN's" in answers[3]


SIZE = b"K\x00(K\x04t(K\x01t"


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (
            call("torch.storage", "_load_from_bytes", b"\x8a\x06" + (10**12).to_bytes(6, "little")),
            "malformed storage",
        ),
        (call("torch.storage", "_load_from_bytes", text("text")), "malformed storage"),
        (storage_of(b"N"), "expected the storage of a tensor"),
        (STORAGE + b"}" + text("dtype") + b"Nsb", "malformed storage"),
        (STORAGE + b"K\x00K\x01s", "puts items into a Storage"),
        (
            call("torch._utils", "_rebuild_tensor_v2", STORAGE, SIZE) + b"(K\x01tb",
            "malformed tensor",
        ),
        (
            call("torch._utils", "_rebuild_tensor_v2", STORAGE, SIZE) + b"K\x00K\x01s",
            "puts items into a StoredTensor",
        ),
    ],
)
def test_tensors_and_storages_cannot_be_altered(tmp_path, instructions, message):
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"\x80\x04" + instructions + b".")
    with pytest.raises(ValueError, match=message):
        read_pickle(path)
