"""The Damaged Alloys set in both layouts, made up, and its download from a local server."""

import hashlib
import io
import json
import urllib.parse
import zipfile

import numpy as np
import PIL.Image
import pytest

from em_data import DataConfig, load_data
from em_data.damaged_alloys import main
from em_data.download import download_file
from em_data.sources import damaged_alloys_download as module
from em_data.sources.damaged_alloys import open_damaged_alloys, pixel_size_from_name
from em_data.sources.damaged_alloys_download import download_damaged_alloys, query_index
from em_data.sources.damaged_alloys_labels import UNIT_TO_PX
from support.file_server import FileServer


def write_image(path, seed, side=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(60, 200, (side, side), dtype=np.uint8)
    PIL.Image.fromarray(levels).save(path, quality=95)


@pytest.fixture
def listed(tmp_path):
    """Layout 1, one folder down: a name without an image, an image not listed, two kinds of box."""
    root = tmp_path / "set" / "Defect-Detection"
    names = ["BF X500K, 06 (2).jpg", "grid1 100kx 3.jpg", "onzone 7.jpg", "lost.jpg"]
    for seed, name in enumerate(names[:3]):
        write_image(root / "images" / name, seed)
    write_image(root / "images" / "grid1 100kx 3_flipped.jpg", 9)
    write_image(root / "negatives" / "n1.jpg", 10)
    (root / "images.txt").write_text("\n".join(names) + "\n")
    (root / "bounding_boxes").mkdir()
    (root / "bounding_boxes" / "BF X500K, 06 (2).txt").write_text("10 20 30 50\n0 0 5 70\n")
    boxes = "0 1 2 9 12\n1 30 30 36 36\n2 40 8 60 28\n"
    (root / "bounding_boxes" / "grid1 100kx 3.txt").write_text(boxes)
    return tmp_path / "set"


@pytest.fixture
def positive(tmp_path):
    """Layout 2: ImageJ tables as .xls, 1-based boxes, more augmented copies than micrographs."""
    root = tmp_path / "matlab"
    write_image(root / "positive" / "a 300kx.jpg", 1, side=1024)
    write_image(root / "positive" / "b 70kx.jpg", 2)
    for seed in range(5):
        write_image(root / "augmented" / f"a_{seed}.jpg", seed)
    header = " ,Area,Mean,Min,Max,XM,YM,Major,Minor,Angle,Length\n"
    (root / "labels").mkdir()
    rows = "1,5,1,0,9,242.77,100,40,20,90,0\n2,5,1,0,9,400,300,30,30,0,0\n"
    (root / "labels" / "a 300kx_dis.xls").write_text(header + rows)
    (root / "labels" / "b 70kx.txt").write_text("1 1 10 20\n")
    return root


def read_all(folder, tmp_path):
    source = open_damaged_alloys(folder, DataConfig(), tmp_path / "cache")
    return source, {entry.name.rsplit("/", 1)[-1]: entry.read() for entry in source.entries}


def test_pixel_sizes_follow_the_names():
    sizes = {"BF X500K, 06 (2)": 0.2832, "70kx a": 0.8805, "100KX": 0.8691, "g_300kx": 0.4785}
    for name, size in [*sizes.items(), ("On-Zone 2", 0.1416)]:
        assert pixel_size_from_name(name) == size
    assert pixel_size_from_name("grid 12") is None
    assert pixel_size_from_name("1500kx") is None


def test_layout_of_the_first_program(listed, tmp_path):
    source, read = read_all(listed, tmp_path)
    assert set(read) == {"BF X500K, 06 (2).jpg", "grid1 100kx 3.jpg", "onzone 7.jpg"}
    text = "\n".join(source.ignored)
    assert "3 of 4 names in images.txt have an image" in text
    assert "such as lost.jpg" in text
    assert "1 images in images/ that images.txt does not list" in text
    assert "1 images in negatives/" in text
    assert "3 micrographs, the study has 494: 0 of 442 with 1024 x 1024 pixels" in text
    assert "3 with 64 x 64, which the study has not" in text
    untyped, typed = read["BF X500K, 06 (2).jpg"], read["grid1 100kx 3.jpg"]
    assert [defect.kind for defect in untyped.defects] == ["loop", "loop"]
    assert [defect.box_px for defect in untyped.defects] == [(20, 10, 50, 30), (0, 0, 64, 5)]
    assert untyped.defects[0].diameter_nm == pytest.approx(30 * 0.2832)
    assert [(d.kind, d.box_px) for d in typed.defects] == [
        ("loop_111", (2, 1, 12, 9)), ("dot", (30, 30, 36, 36)), ("loop_100", (8, 40, 28, 60)),
    ]  # fmt: skip
    assert read["onzone 7.jpg"].defects is None
    assert read["onzone 7.jpg"].pixel_size_nm == 0.1416


def test_layout_of_the_second_program(positive, tmp_path):
    source, read = read_all(positive, tmp_path)
    assert set(read) == {"a 300kx.jpg", "b 70kx.jpg"}
    assert "5 images in augmented/: negatives, augmented copies or crops" in source.ignored
    assert any("1 of 442 with 1024 x 1024" in sentence for sentence in source.ignored)
    loop = read["a 300kx.jpg"].defects[0]  # upright: the angle of the long axis is 90 degrees
    x, y, half_x, half_y = (value * UNIT_TO_PX for value in (242.77, 100, 10, 20))
    assert x == pytest.approx(512)
    assert loop.box_px == pytest.approx((x - half_x, y - half_y, x + half_x, y + half_y), abs=0.5)
    assert loop.diameter_nm == pytest.approx(40 * UNIT_TO_PX * 0.4785)
    assert loop.metadata["axis_ratio"] == 0.5
    assert "older unit" in read["a 300kx.jpg"].metadata["notices"][-1]
    assert read["b 70kx.jpg"].defects[0].box_px == (0, 0, 10, 20)


def test_the_source_trains_by_name(listed, tmp_path):
    config = DataConfig(resolution=32, cache_dir=str(tmp_path / "cache"), held_out_fraction=0.3)
    data = load_data(f"damaged-alloys:{listed}", config, log=lambda text: None)
    assert data.summary["name"] == "damaged-alloys"
    assert data.summary["num_micrographs"] == 3
    assert any("the study has 494" in sentence for sentence in data.summary["ignored"])


def test_what_is_unknown_is_refused_politely(tmp_path, listed):
    with pytest.raises(ValueError, match="no folder; give that of"):
        open_damaged_alloys(tmp_path / "nowhere", DataConfig(), tmp_path)
    write_image(tmp_path / "other" / "x.jpg", 1)
    with pytest.raises(ValueError, match=r"no known layout.*x\.jpg"):
        open_damaged_alloys(tmp_path / "other", DataConfig(), tmp_path)
    bad = listed / "Defect-Detection" / "bounding_boxes" / "onzone 7.txt"
    problems = {"1 2 3": "not a box", "7 1 2 3 4": "not a box", "90 90 99 99": "outside of the"}
    for text, problem in problems.items():
        bad.write_text(text + "\n")
        with pytest.raises(ValueError, match=f"line 1: .*{problem}"):
            read_all(listed, tmp_path)


# ---------------------------------------------------------------- download


@pytest.fixture
def server():
    with FileServer({}) as server:
        yield server


ROOT = "/mdf_open/some place/"


@pytest.fixture
def published(server, listed):
    """Layout 1 behind the server: single files and one archive; the index tells it on two pages."""
    base = listed / "Defect-Detection"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted((base / "bounding_boxes").iterdir()):
            archive.writestr(path.name, path.read_bytes())
    paths = [path for path in base.rglob("*") if path.is_file() and path.suffix != ".txt"]
    paths.append(base / "images.txt")
    contents = {path.relative_to(base).as_posix(): path.read_bytes() for path in paths}
    contents["bounding_boxes.zip"] = packed.getvalue()
    server.files = {ROOT + name: content for name, content in contents.items()}
    records = [
        {
            "globus": f"globus://{module.ENDPOINT}" + urllib.parse.quote(ROOT + name),
            "length": len(content),
            "sha512": hashlib.sha512(content).hexdigest(),
        }
        for name, content in contents.items()
    ]
    mdf = {"source_id": module.SOURCE_ID}
    location = {"endpoint_path": f"globus://{module.ENDPOINT}{ROOT}"}
    another = {"mdf": {"source_id": "another"}, "files": [{"url": "/no"}]}
    pages = [
        {"entries": [{"content": {"mdf": mdf, "data": location}}]},
        {"content": [{"mdf": mdf, "files": records}, another]},
    ]
    server.pages = [{"gmeta": [result], "total": 2} for result in pages]

    def search(query):
        return json.dumps(
            server.pages[min(int(query["offset"][0]), len(server.pages) - 1)]
        ).encode()

    server.files["/search"] = search
    return server


def fetch(server, folder):
    download_damaged_alloys(
        folder, index_url=f"{server.url}/search", server_url=server.url, log=lambda text: None
    )


def test_download_resumes_checks_and_unpacks(published, listed, tmp_path):
    image = ROOT + "images/BF X500K, 06 (2).jpg"
    published.stop_after[image] = len(published.files[image]) // 2
    fetch(published, tmp_path / "fetched")
    ranges = [asked for path, asked in published.asked if path == image]
    assert ranges == [None, f"bytes={len(published.files[image]) // 2}-"]
    source, read = read_all(tmp_path / "fetched", tmp_path)
    _, original = read_all(listed, tmp_path)
    for name, micrograph in original.items():
        assert np.array_equal(read[name].image, micrograph.image)
        assert len(read[name].defects or []) == len(micrograph.defects or [])
    assert len(source.entries) == 3
    assert not [p for p in (tmp_path / "fetched").rglob("*") if p.suffix in (".part", ".etag")]
    published.asked.clear()
    fetch(published, tmp_path / "fetched")
    assert {path for path, _ in published.asked} == {"/search"}  # nothing is fetched twice


def test_a_changed_file_is_refused_and_leaves_nothing(published, tmp_path):
    path = ROOT + "images.txt"
    published.files[path] = b"x" * len(published.files[path])
    with pytest.raises(ValueError, match="SHA-512"):
        fetch(published, tmp_path / "fetched")
    assert not (tmp_path / "fetched" / "images.txt").exists()


def test_an_index_without_files_or_without_the_set_says_the_way_out(published, tmp_path):
    published.pages[1] = {"gmeta": [], "total": 1}
    with pytest.raises(ValueError, match=r"Globus endpoint 82f1b5c6.*under /mdf_open/some place/"):
        fetch(published, tmp_path)
    published.pages = [{"gmeta": [], "total": 0}]
    with pytest.raises(ValueError, match="knows no data set"):
        query_index(f"{published.url}/search")
    with pytest.raises(ConnectionError, match="does not answer"):
        query_index(f"{published.url}/nowhere")
    with pytest.raises(ConnectionError, match="cannot download"):
        download_file(f"{published.url}/nowhere", tmp_path / "x")


def test_no_name_leads_outside_of_the_folder(published, tmp_path):
    files = published.pages[1]["gmeta"][0]["content"][0]["files"]
    files[:] = [{"globus": f"globus://{module.ENDPOINT}{ROOT}../../x"}]
    with pytest.raises(ValueError, match="outside of its folder"):
        fetch(published, tmp_path)


def test_command(published, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = str(tmp_path / "fetched")
    urls = ["--search-url", f"{published.url}/search", "--server-url", published.url]
    main([folder, "--download", *urls])
    assert "3 micrographs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere")])
