"""The house's rule of who may import whom (CONTRIBUTING.md), read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "em_data": set(),
    "em_training": set(),
    "em_evaluation": {"em_data"},
    "em_diffusion": {"em_data", "em_training", "em_evaluation"},
    "em_stylegan": {"em_data", "em_training", "em_evaluation"},
    "em_generation": {"em_data", "em_training", "em_diffusion", "em_stylegan", "em_evaluation"},
    "em_hub": {
        "em_data",
        "em_training",
        "em_diffusion",
        "em_stylegan",
        "em_evaluation",
        "em_generation",
    },
}
# the ground floor: modules that import nothing of ours and that every package may import
GROUND = {"em_data.files", "em_data.download", "em_hub.transport"}
# what judges images while a model is made, and so may call the evaluation, which knows images only
JUDGES = {"em_diffusion/select_autoencoder.py"}
# a published component is one file
HUB_FILES = [
    *ROOT.glob("em_diffusion/pipeline_em_*.py"),
    *ROOT.glob("em_diffusion/em_*.py"),
    *ROOT.glob("em_stylegan/pipeline_em_*.py"),
    *ROOT.glob("em_stylegan/em_*.py"),
]
HUB_ALLOWED = {"torch", "numpy", "diffusers", "PIL"}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, node.lineno


def allowed_as_judge(path):
    return {"em_evaluation"} if str(path.relative_to(ROOT)) in JUDGES else set()


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_lies_below(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name, line in imported_modules(path)
        if (
            name in ALLOWED
            and name != package
            and name not in ALLOWED[package] | allowed_as_judge(path)
        )
        or name
        in {
            "train_ldm",
            "train_gan",
            "evaluate",
            "generate",
            "publish",
            "experiments",
            "benchmarks",
        }
    ]
    assert not wrong


def test_every_package_is_covered_and_listed():
    packages = {path.parent.name for path in ROOT.glob("em_*/__init__.py")}
    assert packages == set(ALLOWED)
    listed = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}"' in listed for name in packages)


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_published_files_stand_alone(path):
    import sys

    # a sibling component is referred to for type and owner's use only inside `if`/`try`, never at the top of the file
    top = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    names = {
        (n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0] for n in top
    }
    assert names <= HUB_ALLOWED | set(sys.stdlib_module_names)


def test_published_files_exist():
    assert {"pipeline_em_ldm.py", "pipeline_em_stylegan.py"} <= {path.name for path in HUB_FILES}


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_floor_imports_nothing_of_ours(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    wrong = [name for name, _ in imported_modules(path) if name.split(".")[0] in ALLOWED]
    assert not wrong
