"""Stand-ins for the trained models of the package, in its layout: half precision, no code."""

import json
from pathlib import Path

from em_generation.families import find_family
from em_hub.export import save_half
from support.models import MAKERS

MODELS = {"em-ldm-64": "ldm", "em-stylegan2-64": "stylegan"}


def write_box(folder: Path, monkeypatch) -> dict[str, Path]:
    """Write tiny models of 16 x 16 pixels under the names of the package's, and let it use them."""
    for name, family in MODELS.items():
        pipeline = MAKERS[family]()
        exact = find_family(type(pipeline).__name__).find_exact_modules(pipeline)
        save_half(pipeline, exact, folder / name)
        (folder / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        record = {"name": name, "config": {"data": "synthetic-varied"}}
        (folder / name / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr("em_pretrained.box.FOLDER", folder)
    return {name: folder / name for name in MODELS}
