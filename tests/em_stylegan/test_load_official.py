"""Networks read from official pickles give the numbers of the original networks; nothing in a
pickle is ever run.
"""

import bz2
import copy
import gzip
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from em_stylegan.em_stylegan3_generator import StyleGAN3Generator
from em_stylegan.load_official import main
from em_stylegan.losses import path_lengths, r1_penalty
from em_stylegan.original.networks import discriminator_from_official, generator_from_official
from em_stylegan.original.reader import ALLOWED, OfficialUnpickler, read_pickle
from em_stylegan.pictures.styles import load_pipeline

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


def assert_gradient_agrees(compute, x, expected):
    """Compare `compute(x[rows], rows)` with expected[rows] to 1e-5 of the deviation, in float64.

    The gradient jumps where the input of a leaky ReLU crosses zero, and rounding decides on which
    side an input lies. So an image may agree at x or at a point next to it that float32 hardly
    resolves; the size of the jump does not matter.
    """
    rng, left = torch.Generator().manual_seed(0), torch.arange(len(x))
    for scale in (0.0, *[3e-7, 1e-6] * 10):
        point = x[left].double()
        point += scale * torch.randn(point.shape, generator=rng, dtype=torch.float64)
        error = (compute(point, left).detach() - expected[left]).abs() / expected.std()
        left = left[error.reshape(len(left), -1).amax(dim=1) >= 1e-5]
        if not len(left):
            return
    raise AssertionError(f"images {left.tolist()} are off by {error.max():.1e} of the deviation")


def assert_r1_agrees(discriminator, numbers):
    images = numbers["D_img"][:4].clone().requires_grad_()
    assert_agrees(r1_penalty(discriminator(images), images), numbers["r1_penalty"])

    def compute_gradient(images, _):
        images.requires_grad_()
        return torch.autograd.grad(wide(images).sum(), images)[0]

    wide = copy.deepcopy(discriminator).double()
    assert_gradient_agrees(compute_gradient, images.detach(), numbers["r1_grads"])


def assert_path_lengths_agree(generator, numbers, unit):
    """The gradient and its length; `unit` turns the stored noise into noise of deviation 1."""
    generator, noise = copy.deepcopy(generator).double(), numbers["pl_noise"].double()

    def compute_gradient(ws, rows):
        images = generator.synthesis(ws.requires_grad_(), noise_mode="const")
        return torch.autograd.grad((images * noise[rows]).sum(), ws)[0]

    def compute_lengths(ws, rows):
        images = generator.synthesis(ws.requires_grad_(), noise_mode="const")
        return path_lengths(images, ws, noise[rows] * unit)

    assert_gradient_agrees(compute_gradient, numbers["ws"], numbers["pl_grads"])
    assert_gradient_agrees(compute_lengths, numbers["ws"], numbers["pl_lengths"])


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
    assert_r1_agrees(discriminator, numbers)


@needs_fixture
def test_path_lengths(generator, numbers):
    # the stored noise is already divided by the square root of the number of pixels
    assert_path_lengths_agree(generator, numbers, unit=numbers["pl_noise"].shape[2])


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
    assert_path_lengths_agree(generator_3, numbers_3, unit=numbers_3["pl_noise"].shape[2])
    discriminator = discriminator_from_official(stored_3["D"])
    for images, count, logits in (
        ("D_img", 8, "D_logits"),
        ("D_img", 4, "D_logits_b4"),
        ("img_const_psi1", 4, "D_logits_fake"),
    ):
        assert_agrees(discriminator(numbers_3[images][:count]), numbers_3[logits])
    assert_r1_agrees(discriminator, numbers_3)


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
        load_pipeline(tmp_path).generator,
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
    [os.system, eval, exec, getattr, __import__, open, torch.load, torch.save, np.load],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickle_runs_nothing(tmp_path, function, protocol):
    target = tmp_path / "target"
    argument = {os.system: f"touch {target}", open: str(target)}.get(
        function, f"open({str(target)!r}, 'w')"
    )
    arguments = (argument, "w") if function in (open, getattr) else (argument,)
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"G": Call(function, *arguments)}, protocol))
    with pytest.raises(ValueError, match="which is no part of a StyleGAN pickle"):
        read_pickle(path)
    assert not target.exists()


def text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


def named(module, name):
    return text(module) + text(name) + b"\x93"


def call(module, name, *arguments):
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def data(contents):
    return b"B" + len(contents).to_bytes(4, "little") + contents


def network(name, state=b"}"):
    meta = b"}(" + text("class_name") + name + text("state") + state + b"u"
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def storage_of(contents):
    """A storage, as a file of its own that holds `contents`."""
    buffer = io.BytesIO()
    torch.save(contents, buffer, _use_new_zipfile_serialization=False)
    return call("torch.storage", "_load_from_bytes", data(buffer.getvalue()))


STORAGE = call(
    "torch.storage", "_load_from_bytes", data(torch.arange(4.0)._typed_storage().__reduce__()[1][0])
)
TENSOR = call("torch._utils", "_rebuild_tensor_v2", STORAGE, b"K\x00(K\x04t(K\x01t")
LONG = b"\x8a\x06" + (10**12).to_bytes(6, "little")
DTYPE = call("numpy", "dtype", text("f8"))
STATE = b"}" + text("_function") + b"Ns"
TRICKS = {
    # attributes of what is allowed
    "a dotted name": named("collections", "OrderedDict.__init__"),
    "a class of a class": named("collections", "OrderedDict.__class__"),
    "a module of a module": named("collections", "abc.sys"),
    # BUILD on a function or type of the reader, on what they return, and items for what takes none
    "state of a function": named("torch._utils", "_rebuild_tensor_v2") + STATE + b"b",
    "slots of a function": named("torch._utils", "_rebuild_tensor_v2") + b"N" + STATE + b"\x86b",
    "state of a type": named("collections", "OrderedDict") + STATE + b"b",
    "slots of a type": named("dnnlib.util", "EasyDict") + b"N" + STATE + b"\x86b",
    "state of a number's type": DTYPE + b"}b",
    "state of a tensor": TENSOR + b"(K\x01tb",
    "items of a storage": STORAGE + b"K\x00K\x01s",
    # calls of allowed functions with other arguments than theirs
    "storage of a number": call("torch.storage", "_load_from_bytes", LONG),
    "storage of text": call("torch.storage", "_load_from_bytes", text("text")),
    "storage of nothing": storage_of(None),
    "storage of a command": storage_of(Call(os.system, "touch target")),
    "storage of a pickle": call("torch.storage", "_load_from_bytes", data(pickle.dumps(1))),
    "tensor of text": call("torch._utils", "_rebuild_tensor_v2", text("a"), b"K\x00))"),
    "array of objects": call("numpy", "dtype", text("O"))
    + b"0"
    + call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("O")), data(bytes(8))),
    "class name of a number": network(b"K\x01"),
    "state of a number": network(text("Generator"), b"K\x01"),
    "network of nothing": call("torch_utils.persistence", "_reconstruct_persistent_obj", b"N"),
    "call of a network": network(text("Generator")) + b")R",
    "new function": named("torch._utils", "_rebuild_tensor_v2") + b")\x81",
    "object outside the file": text("a") + b"Q",
}


@pytest.mark.parametrize("name", TRICKS)
def test_what_a_pickle_may_not_do(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"\x80\x04" + TRICKS[name] + b".")
    before = {
        key: dict(vars(value)) for key, value in ALLOWED.items() if hasattr(value, "__dict__")
    }
    with pytest.raises(ValueError, match="is not a StyleGAN pickle that can be read safely"):
        read_pickle(path)
    assert os.listdir(tmp_path) == ["evil.pkl"]
    assert before == {key: dict(vars(ALLOWED[key])) for key in before}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.mkdir(), "is a folder; give the file"),
        (lambda path: path.write_bytes(gzip.compress(b"N.")), "is packed with gzip: unpack it"),
        (lambda path: path.write_bytes(bz2.compress(b"N.")), "is packed with bzip2: unpack it"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "is a zip archive"),
        (lambda path: torch.save({"G": 1}, path), "is a zip archive.*no official StyleGAN's"),
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
        (
            lambda path: path.write_bytes(b"cdnnlib.tflib.network\nNetwork\n."),
            "a pickle of the TensorFlow version",
        ),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, write, message):
    write(tmp_path / "a.pkl")
    with pytest.raises(ValueError, match=rf"a\.pkl .*{message}|a\.pkl {message}"):
        read_pickle(tmp_path / "a.pkl")


def read_value(tmp_path, value, protocol=4):
    """What the reader makes of one pickled value."""
    path = tmp_path / "value.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    with path.open("rb") as file:
        return OfficialUnpickler(file).load()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numbers_containers_and_arrays_are_read(tmp_path, protocol):
    plain = {"a": [1, (2.0, None)], "b": {1, 2}, "c": b"bytes", "d": frozenset([3]), "e": 1j}
    assert read_value(tmp_path, plain, protocol) == plain
    numbers = [np.float64(0.25), np.int32(7), np.bool_(True), np.dtype(">f4").type(0.5)]
    assert read_value(tmp_path, numbers, protocol) == [0.25, 7, True, 0.5]
    for array in (np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.array([], ">i2")):
        found = read_value(tmp_path, array, protocol)
        assert np.array_equal(getattr(found, "array", found), array)
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        read_value(tmp_path, np.array([None, 1], dtype=object), protocol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool], ids=str)
def test_tensors_are_read(tmp_path, dtype):
    values = torch.arange(6).to(dtype).reshape(2, 3)
    found = read_value(tmp_path, [values, values.T, torch.nn.Parameter(values, False), values[:0]])
    for tensor, expected in zip(found, (values, values.T, values, values[:0]), strict=True):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected)


class Tensor:
    """Pickles as a tensor in a storage of four."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def __reduce__(self):
        storage = torch.arange(4.0)._typed_storage()
        return torch._utils._rebuild_tensor_v2, (storage, *self.numbers, False, None)


def test_tensors_stay_within_their_storage(tmp_path):
    assert read_value(tmp_path, Tensor(1, (3,), (1,))).tolist() == [1, 2, 3]
    for numbers in ((1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (-1,), (1,))):
        with pytest.raises(RuntimeError):
            read_value(tmp_path, Tensor(*numbers))
