"""Files of electron microscopes: dm3, dm4, ser, mrc, emd, hspy and others, by RosettaSciIO."""

import struct
import sys

import numpy as np
import pytest

from em_data.config import DataConfig
from em_data.formats import Refusal, decode
from em_data.formats.microscopes import SUFFIXES, find_format
from em_data.reading import read_micrographs
from em_data.sources.folder import list_images, open_folder
from support.microscope_files import (
    DM_TYPES,
    MRC_MODES,
    make_dm,
    make_mrc,
    make_ser,
    write_hspy,
    write_velox,
)

RNG = np.random.default_rng(7)
STACK = RNG.integers(0, 1000, (3, 20, 30)).astype(np.uint16)
IMAGE = STACK[0]


@pytest.fixture(autouse=True)
def extra():
    reason = 'RosettaSciIO is not installed: pip install "em-synthesis[microscopes]"'
    pytest.importorskip("rsciio", reason=reason)
    pytest.importorskip("h5py", reason=reason)


@pytest.fixture
def store(tmp_path):
    """Return a function that writes a file and lists its images as they are stored."""

    def read(name, data, **options):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        return list(decode(path, **options))

    return read


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("dtype", DM_TYPES)
def test_dm_keeps_pixels_and_scale_of_every_type(version, dtype, store):
    array = (IMAGE - 100 * (dtype in ("int16", "int32", "float32", "float64"))).astype(dtype)
    facts = {"scale": 0.02, "unit": "µm", "name": "HAADF"}
    data = make_dm([(array, facts)], version, thumbnail=np.zeros((4, 5), np.uint8))
    (stored,) = store(f"a.dm{version}", data)
    assert stored.array.dtype == dtype
    np.testing.assert_array_equal(stored.array, array)
    assert stored.pixel_size_nm == pytest.approx(20.0)
    assert (stored.name, stored.frame) == (None, None)
    assert stored.metadata["title"] == "HAADF"


def test_content_decides_not_the_suffix(store):
    for name in ("a.tif", "a.ser", "a.dm3", "a"):
        (stored,) = store(name, make_dm([(IMAGE, {})]))
        np.testing.assert_array_equal(stored.array, IMAGE)
    (stored,) = store("b.tif", make_ser(IMAGE[None]))
    np.testing.assert_array_equal(stored.array, IMAGE)
    (stored,) = decode(make_ser(IMAGE[None]))
    np.testing.assert_array_equal(stored.array, IMAGE)
    assert find_format(make_mrc(IMAGE)[:1024], ".tif").name == "MRC"
    with pytest.raises(Refusal, match="by its content"):
        store("c.tif", b"no image at all" * 10)


@pytest.mark.parametrize("kind", ["a.dm4", "a.ser", "a.mrc", "a.emd", "a.hspy"])
def test_stacks_are_read_frame_by_frame(kind, store, tmp_path):
    data = {
        "a.dm4": make_dm([(STACK, {"scale": 1.0, "unit": "nm"})]),
        "a.ser": make_ser(STACK),
        "a.mrc": make_mrc(STACK, (300.0, 200.0, 30.0)),
    }.get(kind)
    if kind == "a.emd":
        write_velox(tmp_path / kind, {"HAADF": (np.moveaxis(STACK, 0, -1), 1e-9)})
    elif kind == "a.hspy":
        write_hspy(tmp_path / kind, STACK, ["s", "nm", "nm"], navigate=[0])
    frames = store(kind, data)
    assert [frame.frame for frame in frames] == [0, 1, 2]
    np.testing.assert_array_equal([frame.array for frame in frames], STACK)
    assert {frame.pixel_size_nm for frame in frames} == {0.5 if kind == "a.hspy" else 1.0}
    assert [frame.frame for frame in store(kind, None, frame_step=2)] == [0, 2]


@pytest.mark.parametrize("dtype", sorted(set(MRC_MODES) - {"complex64", "int8"}))
def test_mrc_keeps_pixels_of_every_mode(dtype, store):
    (stored,) = store("a.rec", make_mrc(IMAGE.astype(dtype)))
    np.testing.assert_array_equal(stored.array, IMAGE.astype(dtype))
    assert stored.array.dtype == dtype


def test_channels_of_velox_are_micrographs_of_their_own(tmp_path):
    channels = {"HAADF": (STACK[0][..., None], 2e-9), "BF": (STACK[1][..., None], 2e-9)}
    channels["Fe"] = (STACK[2][..., None], 2e-9)
    write_velox(tmp_path / "a.emd", channels)
    haadf, bf = read_micrographs(tmp_path / "a.emd", name="a.emd")
    assert [haadf.name, bf.name] == ["a.emd#HAADF", "a.emd#BF"]
    np.testing.assert_array_equal(haadf.image, STACK[0])
    np.testing.assert_array_equal(bf.image, STACK[1])
    assert haadf.pixel_size_nm == bf.pixel_size_nm == pytest.approx(2.0)
    assert haadf.metadata["voltage_kV"] == 200.0
    assert haadf.metadata["instrument"] == "Talos"
    assert haadf.metadata["notices"] == [
        "not used: an X-ray map (Fe), not a micrograph",
        "2 images (HAADF, BF): each is a micrograph; to train on one of them, save it as a file of "
        "its own",
    ]
    assert bf.metadata["notices"] == []


def test_what_is_no_micrograph_is_refused_by_its_name(store, tmp_path):
    cube = RNG.random((4, 5, 6)).astype(np.float32)
    set_4d = np.stack([cube, cube])
    kinds = {
        "spectrum image": (cube, ["nm", "nm", "eV"], [0, 1], ""),
        "4D-STEM set of diffraction": (set_4d, ["nm", "nm", "1/nm", "1/nm"], [0, 1], ""),
        "a diffraction pattern": (cube[0], ["1/nm", "1/nm"], [], ""),
        r"a diffraction pattern \(5 x 6\)": (cube[0], ["", ""], [], "electron_diffraction"),
        "spectrum or line profile": (cube[0, 0], ["eV"], [], ""),
        "line of spectra": (cube[0], ["nm", "eV"], [0], "EELS"),
        "complex": (cube[0] * 1j, ["nm", "nm"], [], ""),
        "axes do not say": (cube, ["", "", ""], [], ""),
    }
    for i, (reason, (array, units, navigate, signal_type)) in enumerate(kinds.items()):
        write_hspy(tmp_path / f"{i}.hspy", array, units, navigate, signal_type=signal_type)
        with pytest.raises(Refusal, match=reason):
            store(f"{i}.hspy", None)
    with pytest.raises(Refusal, match="diffraction pattern"):
        store("a.dm4", make_dm([(IMAGE, {"scale": 0.1, "unit": "1/nm"})]))
    with pytest.raises(Refusal, match=r"diffraction pattern.*1/m"):
        store("a.ser", make_ser(IMAGE[None], scale_m=1e8))


def test_a_header_that_announces_more_than_the_file_holds_is_refused(store):
    with pytest.raises(Refusal, match="truncated: 4000000000 images"):
        store("a.ser", make_ser(STACK, num_announced=4_000_000_000))
    with pytest.raises(Refusal, match="truncated: 100000 x 100000"):
        store("a.mrc", make_mrc(IMAGE, shape=(100_000, 100_000, 100_000)))
    with pytest.raises(Refusal, match="truncated"):
        store("a.dm4", make_dm([(IMAGE, {})])[:-600])
    with pytest.raises(Refusal, match="take 2400 bytes, but 1200 are stored"):
        store("a.dm3", make_dm([(IMAGE, {"shape": (40, 30)})], 3))


def test_mrc_bytes_are_signed_as_the_header_says(store):
    signed = RNG.integers(-100, 100, (20, 30)).astype(np.int8)
    unsigned = signed.view(np.uint8)
    for imod, expected in ((None, signed), (1, signed), (0, unsigned)):
        (stored,) = store("a.mrc", make_mrc(signed, imod=imod))
        np.testing.assert_array_equal(stored.array, expected)
        assert stored.array.dtype == expected.dtype
    data = bytearray(make_mrc(signed))
    data[76:84] = np.array([3, 250], "<f4").tobytes()  # least and largest value
    (stored,) = store("a.mrc", bytes(data))
    np.testing.assert_array_equal(stored.array, unsigned)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
def test_mrc_of_the_other_order_of_bytes(dtype, store):
    stack = (STACK - 300.0).clip(0 if dtype == "uint16" else None).astype(dtype)
    frames = store("a.mrc", make_mrc(stack, (90.0, 60.0, 3.0), order=">"))
    np.testing.assert_array_equal([frame.array for frame in frames], stack)
    assert {frame.array.dtype for frame in frames} == {np.dtype(dtype)}
    assert [frame.pixel_size_nm for frame in frames] == [pytest.approx(0.3)] * 3


def test_mrc_without_a_cell_has_no_pixel_size(store):
    data = bytearray(make_mrc(IMAGE, (300.0, 200.0, 1.0)))
    assert store("a.mrc", bytes(data))[0].pixel_size_nm == pytest.approx(1.0)
    assert store("a.mrc", make_mrc(IMAGE))[0].pixel_size_nm is None
    data[40:48] = np.array(IMAGE.shape[::-1], "<f4").tobytes()  # 1 angstrom per pixel, by default
    (unstated,) = store("a.mrc", bytes(data))
    assert unstated.pixel_size_nm is None
    assert "exactly 1 angstrom per pixel" in unstated.metadata["notices"][0]
    data[28:36] = bytes(8)  # no samples along the cell
    assert store("a.mrc", bytes(data))[0].pixel_size_nm is None
    (stored,) = store("a.mrc", bytes(data) + bytes(77))
    assert stored.metadata["notices"] == ["77 bytes behind the pixels that the header announces"]


def test_hdf5_data_that_was_never_written_is_not_read_as_zeros(store, tmp_path):
    import h5py

    write_velox(tmp_path / "a.emd", {"HAADF": (np.moveaxis(STACK, 0, -1), 1e-9)})
    with h5py.File(tmp_path / "a.emd", "a") as file:
        group = file["Data/Image/" + "0" * 32]
        del group["Data"]
        data = group.create_dataset("Data", (20, 30, 3), np.uint16, chunks=(20, 30, 1))
        data[:, :, 0] = IMAGE
    with pytest.raises(Refusal, match="1 of 3 parts of Data are written"):
        store("a.emd", None)


EMI = (
    "<ObjectInfo><ExperimentalDescription><Root>"
    "<Data><Label>Mode</Label><Value> {}</Value></Data>"
    "<Data><Label>Microscope</Label><Value>Microscope Talos 200 kV</Value></Data>"
    "<Data><Label>High tension</Label><Value>200</Value><Unit>kV</Unit></Data>"
    "</Root></ExperimentalDescription></ObjectInfo>"
)


def test_emi_file_tells_of_its_series(store, tmp_path):
    (tmp_path / "a.emi").write_bytes(b"\0JJ" + EMI.format("STEM nP SA Zoom Diffraction").encode())
    (tmp_path / "a_2.ser").write_bytes(make_ser(STACK[1:2]))
    (stored,) = store("a_1.ser", make_ser(IMAGE[None]))
    assert stored.metadata["voltage_kV"] == 200.0
    assert stored.metadata["instrument"] == "Talos 200 kV"
    source = open_folder(tmp_path, DataConfig(), tmp_path / "hashes")
    assert [entry.name for entry in source.entries] == ["a_1.ser", "a_2.ser"]
    assert {entry.group for entry in source.entries} == {"a.ser"}
    assert source.ignored == []
    keys = [entry.key for entry in source.entries]
    (tmp_path / "a.emi").write_bytes(EMI.format("TEM uP SA Zoom Diffraction").encode())
    source = open_folder(tmp_path, DataConfig(), tmp_path / "hashes")
    assert not {entry.key for entry in source.entries} & set(keys)
    with pytest.raises(ValueError, match=r"a_1\.ser: a diffraction pattern: a\.emi"):
        source.entries[0].read()
    (tmp_path / "a.emi").write_bytes(b"<ExperimentalDescription>no xml</ExperimentalDescription>")
    (stored,) = store("a_1.ser", None)
    np.testing.assert_array_equal(stored.array, IMAGE)


def test_pixels_beside_the_header_of_ripple_are_part_of_the_file(tmp_path):
    fields = {"width": 30, "height": 20, "depth": 1, "offset": 0, "data-length": 2}
    fields |= {"data-type": "unsigned", "byte-order": "little-endian", "record-by": "dont-care"}
    text = "".join(f"{key}\t{value}\n" for key, value in {"key": "value", **fields}.items())
    (tmp_path / "a.rpl").write_text(text)
    (tmp_path / "a.raw").write_bytes(IMAGE.tobytes())
    source = open_folder(tmp_path, DataConfig(), tmp_path / "hashes")
    (entry,) = source.entries
    np.testing.assert_array_equal(entry.read().image, IMAGE)
    assert source.ignored == []
    (tmp_path / "a.raw").write_bytes(IMAGE[::-1].tobytes())
    (changed,) = open_folder(tmp_path, DataConfig(), tmp_path / "hashes").entries
    assert changed.key != entry.key
    (tmp_path / "a.raw").write_bytes(IMAGE.tobytes()[:-1])
    with pytest.raises(ValueError, match=r"1200 bytes are announced, 1199 are in a\.raw"):
        changed.read()


def test_hdf5_files_do_not_have_other_files_read(store, tmp_path):
    import h5py

    (tmp_path / "secret").write_bytes(bytes(range(256)) * 3)
    with h5py.File(tmp_path / "a.emd", "w", libver="latest") as file:
        group = file.create_group("data")
        group.attrs["emd_group_type"] = 1
        group.attrs["version_major"] = 0
        outside = [(str(tmp_path / "secret"), 0, 600)]
        group.create_dataset("data", (20, 30), np.uint8, external=outside)
    with pytest.raises(Refusal, match="lies in another file"):
        store("a.emd", None)
    with h5py.File(tmp_path / "b.emd", "w") as file:
        file["data"] = h5py.ExternalLink("a.emd", "/data")
    with pytest.raises(Refusal, match="lies in another file"):
        store("b.emd", None)


def mutate(data, rng):
    """Return a file with flipped bits, a lying number or a missing end."""
    data, kind = bytearray(data), rng.integers(3)
    head = min(len(data), int(rng.choice([64, 1024, 10**9])))
    if kind == 0:
        return bytes(data[: rng.integers(1, len(data))])
    for _ in range(rng.integers(1, 20)):
        place = rng.integers(head - 4)
        if kind == 1:
            data[place] ^= 1 << rng.integers(8)
        else:
            number = int(rng.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
            data[place : place + 4] = number.to_bytes(4, ("little", "big")[rng.integers(2)])
    return bytes(data)


@pytest.mark.timeout(120)
def test_damaged_files_are_refused_or_read_in_bounded_time(tmp_path):
    write_velox(tmp_path / "whole.emd", {"HAADF": (np.moveaxis(STACK, 0, -1), 1e-9)})
    write_hspy(tmp_path / "whole.hspy", STACK, ["s", "nm", "nm"], navigate=[0])
    whole = {
        "dm3": make_dm([(IMAGE, {"scale": 1.0, "unit": "nm"})], 3),
        "dm4": make_dm([(STACK, {"scale": 1.0, "unit": "nm"}), (IMAGE, {})]),
        "ser": make_ser(STACK),
        "mrc": make_mrc(STACK, (30.0, 20.0, 3.0)),
        "emd": (tmp_path / "whole.emd").read_bytes(),
        "hspy": (tmp_path / "whole.hspy").read_bytes(),
    }
    rng, messages = np.random.default_rng(3), []
    for i in range(120):
        suffix = list(whole)[i % 4] if i % 12 else list(whole)[4 + i // 12 % 2]
        path = tmp_path / f"{i}.{suffix}"
        path.write_bytes(mutate(whole[suffix], rng))
        try:
            for micrograph in read_micrographs(path, name=path.name):
                assert micrograph.image.size <= 10**7
        except ValueError as error:
            messages.append((path.name, str(error)))
    assert len(messages) > 60
    assert all(text.startswith(name) and "\n" not in text for name, text in messages)


def test_a_lying_number_of_empty_values_does_not_fill_the_memory(store):
    # an array of 2^40 structures without fields: no byte of the file, and an endless list
    tag = b"\x15\0\1x" + b"%%%%" + struct.pack(">6q", 5, 20, 15, 0, 0, 2**40)
    tag = tag[:4] + struct.pack(">q", len(tag)) + tag[4:]
    data = make_dm([(IMAGE, {})])
    root = 4 + 8 + 4
    (num_tags,) = struct.unpack_from(">q", data, root + 2)
    body = data[root + 10 :]
    data = data[: root + 2] + struct.pack(">q", num_tags + 1) + tag + body
    with pytest.raises(Refusal, match="1099511627776 values of 0 bytes"):
        store("a.dm4", data)


def test_without_the_extra_the_message_names_it(store, monkeypatch, tmp_path):
    write_velox(tmp_path / "b.emd", {"HAADF": (IMAGE[..., None], 1e-9)})
    for name in ("rsciio.digitalmicrograph", "h5py"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, data in (("a.dm4", make_dm([(IMAGE, {})])), ("b.emd", None)):
        with pytest.raises(Refusal, match=r'pip install "em-synthesis\[microscopes\]"'):
            store(name, data)


def test_folder_lists_files_of_microscopes_and_names_the_others(tmp_path):
    for suffix in [*SUFFIXES, ".blo", ".msa"]:
        (tmp_path / f"a{suffix}").write_bytes(b"x")
    listing = list_images(tmp_path)
    ignored = listing.describe_ignored()
    assert {path.suffix for path in listing.paths} == set(SUFFIXES)
    assert any(each.startswith("1 .blo files: 4D-STEM sets of diffraction") for each in ignored)
    assert "1 .msa files: spectra, not micrographs" in ignored


def test_bytes_too_many_in_a_series_of_tia_are_said(store):
    data = make_ser(STACK)
    start = data.index(STACK[2][::-1].tobytes())  # of the last one
    frames = store("a.ser", data[:start] + bytes(40) + data[start:])
    assert "1 of 3 images have their time elsewhere" in frames[0].metadata["notices"][0]
    assert all(not frame.metadata["notices"] for frame in store("a.ser", data))
