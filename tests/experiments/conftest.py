import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="session")
def load_recipe():
    """Imports a recipe by its path below experiments/, with the modules beside it, as its command
    does.
    """

    def load(path):
        path = ROOT / path
        spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
        return module

    return load


@pytest.fixture
def arguments(tmp_path):
    """Flags that let a recipe write below a temporary folder only."""
    folders = {
        "runs": tmp_path / "runs",
        "results": tmp_path / "results",
        "cache-dir": tmp_path / "cache",
    }
    return [text for name, path in folders.items() for text in (f"--{name}", str(path))]
