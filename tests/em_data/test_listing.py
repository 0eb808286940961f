"""What of a folder is read, what is not and said, and what is never looked at."""

import os
import shutil
import socket

import numpy as np
import PIL.Image
import pytest
import tifffile

from em_data import load_data
from em_data.files import printable
from em_data.sources.folder import hash_files
from em_data.sources.listing import list_images
from support.microscope_files import make_mrc


@pytest.fixture
def folder(tmp_path, noise):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(2):
        PIL.Image.fromarray(noise(i)).save(folder / f"{i}.png")
    return folder


def names_and_sentences(folder):
    listing = list_images(folder)
    return [path.as_posix() for path in listing.paths], listing.describe_ignored()


@pytest.mark.parametrize(
    ("suffix", "remedy"),
    [
        (".czi", "Export them as TIFF"),
        (".nd2", "Export them as TIFF"),
        (".lif", "Export them as TIFF"),
        (".jp2", "Convert them to TIFF or PNG"),
        (".webp", "Convert them to TIFF or PNG"),
        (".GIF", "Convert them to TIFF or PNG"),
        (".npy", "Save each array as TIFF"),
        (".zip", "Unpack them"),
        (".parquet", "--data datasets:FOLDER"),
        (".xyz", "If they are images, export them as TIFF"),
    ],
)
def test_files_that_are_not_read_are_counted_by_suffix(folder, suffix, remedy):
    for i in range(2):
        (folder / f"file {i}{suffix}").write_bytes(b"binary\0data")
    names, (sentence,) = names_and_sentences(folder)
    assert names == ["0.png", "1.png"]
    assert sentence.startswith(f"2 {suffix.lower()} files: not read. ")
    assert remedy in sentence


def test_texts_and_what_systems_leave_are_not_looked_at(folder):
    for name in ("notes.txt", "README", "labels.csv", "BMP files lie here", "Thumbs.db", ".a.tif"):
        (folder / name).write_text("BM is how a BMP begins, and this text does, too")
    for name in ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", ".ipynb_checkpoints"):
        (folder / "sub" / name).mkdir(parents=True)
        shutil.copy(folder / "0.png", folder / "sub" / name / "thumbnail.png")
    assert names_and_sentences(folder) == (["0.png", "1.png"], [])


def test_images_are_told_by_content_where_the_suffix_is_unknown(folder, noise):
    shutil.copy(folder / "0.png", folder / "no suffix")
    shutil.copy(folder / "1.png", folder / "BF 1.5kx")
    for suffix in (".btf", ".tf8", ".ptif", ".001"):
        tifffile.imwrite(folder / f"image{suffix}", noise(3), photometric="minisblack")
    for suffix in (".jfif", ".jpe"):
        PIL.Image.fromarray(noise(3)).save(folder / f"image{suffix}", format="JPEG")
    names, ignored = names_and_sentences(folder)
    assert len(names) == 10
    assert not ignored


def test_pipes_devices_and_dangling_links_are_named_and_never_opened(folder, tmp_path, config):
    os.mkfifo(folder / "pipe.tif")
    (folder / "zero.tif").symlink_to("/dev/zero")
    (folder / "dangling.tif").symlink_to(tmp_path / "gone.tif")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket.tif"))
    said = []
    data = load_data(folder, config(), log=said.append)
    server.close()
    assert data.summary["num_micrographs"] == 2
    for name in ("pipe.tif", "zero.tif", "socket.tif"):
        assert any("never read" in line and name in line for line in said)
    assert any("dangling.tif: cannot be read: No such file" in line for line in said)
    paths = [folder / name for name in ("pipe.tif", "zero.tif", "0.png")]
    assert hash_files(paths, tmp_path)[:2] == ["not a regular file"] * 2


def test_pointers_of_git_lfs_are_told_as_such(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
    (folder / "a.tif").write_text(pointer)
    names, (sentence,) = names_and_sentences(folder)
    assert names == ["0.png", "1.png"]
    assert "git lfs pull" in sentence
    for name in names:
        (folder / name).write_text(pointer)
    with pytest.raises(ValueError, match=r"holds no TIFF.*3 pointers of Git LFS.*git lfs pull"):
        list_images(folder)


def test_names_reach_the_terminal_escaped(folder, config):
    assert printable("a\x1b[2Jb\n\u202e") == "a\\x1b[2Jb\\n\\u202e"
    assert printable(os.fsdecode(b"\xff.tif")) == "\\xff.tif"
    assert printable("größe 1.tif") == "größe 1.tif"
    for name in (b"\xfe.png", b"\xff.png", b"new\nline.png", b"\x1b[31m.png"):
        shutil.copy(folder / "0.png", os.fsencode(folder) + b"/" + name)
        (folder / os.fsdecode(name + b".zip")).write_bytes(b"\0")
    (folder / "\x1b[32m.tif").write_bytes(b"")
    said = []
    data = load_data(folder, config(split="leaky"), log=said.append)
    assert data.summary["num_micrographs"] == 6
    assert all(line.replace("\n  ", "").isprintable() for line in said)


def test_files_of_microscopes_that_hold_no_micrographs_are_named(tmp_path, noise, config):
    for i in range(3):
        PIL.Image.fromarray(noise(i, (64, 64))).save(tmp_path / f"em_00{i}.png")
    for name in ("a.mib", "b.pts", "c.ASW", "d.blo", "e.map", "g.app5"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    (tmp_path / "f.zspy" / "Experiments").mkdir(parents=True)
    (tmp_path / "f.zspy" / "Experiments" / "0.0").write_bytes(b"\0" * 100)
    said = []
    assert load_data(tmp_path, config(), log=said.append).summary["num_micrographs"] == 3
    for words in (
        "1 .mib files: sets of diffraction patterns",
        "1 .pts files: X-ray spectrum images",
        "1 .asw files: projects of JEOL, whose images (.img) are read by themselves",
        "1 .blo files: 4D-STEM sets of diffraction patterns (export their virtual images as TIFF)",
        "1 .map files: X-ray maps",
        "1 .zspy files: sets of HyperSpy in many files (save them as .hspy)",
        "1 .app5 files: 4D-STEM sets",
    ):
        assert any(line.startswith(words) for line in said), words


def test_a_map_that_begins_as_an_mrc_file_is_read(tmp_path, noise, config):
    pytest.importorskip("rsciio")
    for i in range(3):
        levels = noise(i, (64, 96)).astype(np.int16)
        (tmp_path / f"{i}.map").write_bytes(make_mrc(levels))
    data = load_data(tmp_path, config(), log=print)
    assert data.summary["num_micrographs"] == 3
