"""The report's section on labels, for folders of images that have some."""

from types import SimpleNamespace

from em_data.config import DataConfig
from em_data.data import load_data
from em_data.labels import write_labelled
from em_data.synthetic_micrographs import synthesise_micrographs
from em_evaluation.detector import adherence_section
from em_evaluation.evaluator import RealImages
from em_generation.adherence import add_adherence


def test_labelled_folders_have_a_section_and_others_none(tmp_path, monkeypatch):
    monkeypatch.setattr(adherence_section, "NUM_STEPS", 2)
    write_labelled(list(synthesise_micrographs(3, size=64)), tmp_path / "pairs")
    (tmp_path / "plain").mkdir()
    for i, path in enumerate((tmp_path / "pairs" / "images").rglob("*.png")):
        (tmp_path / "plain" / f"{i}.png").write_bytes(path.read_bytes())
    cache = str(tmp_path / "cache")
    tiles = DataConfig(
        resolution=64, micrograph_size=64, num_synthetic=8, split="specimen", cache_dir=cache
    )
    data = load_data("synthetic-other", tiles, log=lambda text: None)
    real = RealImages(data.held_out, data.train, data.summary)
    config = SimpleNamespace(cache_dir=cache, seed=0)

    def add(name, real=real):
        report, said = {}, []
        candidate = SimpleNamespace(name=name, source=str(tmp_path / name), images=[])
        pictures = add_adherence(report, config, [candidate], real, log=said.append)
        return report, pictures, said

    report, pictures, said = add("pairs")
    assert [row["name"] for row in report["adherence"]["sets"]] == ["held-out micrographs", "pairs"]
    assert report["adherence"]["sets"][1]["num_images"] == 3
    assert [picture["role"] for picture in pictures] == ["adherence"] * 2
    assert any("pairs" in line for line in said)
    assert add("plain") == ({}, [], [])
    assert add("pairs", RealImages(data.held_out, None, data.summary)) == ({}, [], [])
