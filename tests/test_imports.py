"""Who may import whom (docs/architecture.md), read off the source."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = {
    "em_pretrained": set(),
    "em_data": set(),
    "em_training": set(),
    "em_evaluation": {"em_data"},
    "em_diffusion": {"em_data", "em_training", "em_evaluation"},
    "em_stylegan": {"em_data", "em_training", "em_evaluation"},
    "em_cyclegan": {"em_data", "em_training", "em_evaluation"},
    "em_stable_diffusion": {"em_data", "em_training", "em_evaluation"},
}
FAMILIES = {"em_diffusion", "em_stylegan", "em_cyclegan", "em_stable_diffusion"}
LIBRARY["em_generation"] = {*LIBRARY} - {"em_pretrained"}
LIBRARY["em_hub"] = {*LIBRARY}
COMMANDS = "em_commands"
PACKAGES = [*LIBRARY, COMMANDS]
# modules that import nothing of ours but each other and that every package may import
GROUND_FLOOR = {"em_data.files", "em_data.download", "em_hub.transport", "em_pretrained"}
GROUND_FLOOR |= {"em_pretrained.box"}
# modules of a family that may call em_evaluation: they judge images while a model is made
JUDGES = re.compile(
    r"em_\w+\.(\w*loop|train|family|layout_stage|reconstruction|select_autoencoder|choose_guidance)"
)
# a published component is one file
PUBLISHED = sorted(
    [*ROOT.glob("em_*/em_*.py"), *ROOT.glob("em_*/pipeline_em_*.py")], key=lambda path: path.name
)
PUBLISHED_MAY_IMPORT = {"torch", "numpy", "diffusers", "PIL", *sys.stdlib_module_names}
SCRIPTS = ["train_ldm", "train_gan", "train_cyclegan", "train_lora"]
SCRIPTS += ["generate", "evaluate", "publish"]
PROGRAMS = [*SCRIPTS, "look"]  # a program without a root script is python -m em_data.look, too
NEVER_IMPORTED = {*SCRIPTS, "app", "experiments", "benchmarks", "tests", "support"}
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_ONLY |= {"crypt", "nis", "ossaudiodev", "spwd", "readline"}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def find_imports(path):
    """Return [(name, line)] of every import at any depth, `import_module("...")` included.

    `from a.b import c` gives a.b.c if that is a module of ours, the module that a lazy package
    imports c from, or a.b.
    """
    return list(walk_imports(path))


def walk_imports(path):
    module = module_of(path)
    package = module if path.name.startswith("__init__") else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                known = lazy_names().get(full, base)
                yield (full if full in modules() else known), node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


@functools.cache
def modules():
    return {module_of(path): path for package in PACKAGES for path in files_of(package)}


def files_of(package):
    return sorted((ROOT / package).rglob("*.py"))


@functools.cache
def lazy_names():
    """Return {"package.name": its module} of all names in the stubs of the packages."""
    names = {}
    for stub in ROOT.glob("em_*/__init__.pyi"):
        for node in ast.parse(stub.read_text()).body:
            assert isinstance(node, ast.ImportFrom), f"{stub} holds more than imports"
            assert node.level == 1, f"{stub} imports from another package"
            for alias in node.names:
                package = stub.parent.name
                names[f"{package}.{alias.asname}"] = f"{package}.{node.module}"
    return names


def top(name):
    return name.split(".")[0]


def may_import(module, name):
    package, other = top(module), top(name)
    if other == package or other not in PACKAGES or name in GROUND_FLOOR:
        return True
    if other == "em_evaluation" and package in FAMILIES:
        return JUDGES.fullmatch(module) is not None or name.startswith("em_evaluation.perceptual")
    return other in LIBRARY[package]


@pytest.mark.parametrize("package", LIBRARY)
def test_packages_import_only_what_lies_below(package):
    wrong = [
        f"{module_of(path)}:{line} imports {name}"
        for path in files_of(package)
        for name, line in find_imports(path)
        if not may_import(module_of(path), name) or top(name) in {COMMANDS, *NEVER_IMPORTED}
    ]
    assert not wrong


def test_the_rules_refuse_what_they_name():
    assert not may_import("em_data.tiles", "em_training.run")
    assert not may_import("em_training.run", "em_data.tiles")
    assert not may_import("em_evaluation.images", "em_diffusion.latents")
    assert not may_import("em_diffusion.latents", "em_stylegan.losses")
    assert not may_import("em_diffusion.latents", "em_evaluation.distances")
    assert may_import("em_stylegan.pictures.projection", "em_evaluation.perceptual")
    assert may_import("em_diffusion.denoiser_loop", "em_evaluation.held_out")
    assert may_import("em_training.run", "em_data.files")


def test_every_package_is_covered_and_in_the_wheel():
    packages = {path.parent.name for path in ROOT.glob("em_*/__init__.py")}
    assert packages == set(PACKAGES)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["em_*", "model_cards"]
    assert {*packages} == set(project["tool"]["mypy"]["packages"])
    assert all((ROOT / package / "py.typed").is_file() for package in packages)
    scripts = {name.replace("_", "-"): f"{COMMANDS}.{name}:main" for name in PROGRAMS}
    assert project["project"]["scripts"] == {f"em-{key}": value for key, value in scripts.items()}


@pytest.mark.parametrize("module", sorted(GROUND_FLOOR))
def test_the_ground_floor_imports_nothing_of_ours(module):
    imports = {name for name, _ in find_imports(modules()[module]) if top(name) in PACKAGES}
    assert not imports - GROUND_FLOOR


@pytest.mark.parametrize("script", SCRIPTS)
def test_root_scripts_only_call_their_command(script):
    imports = {name for name, _ in find_imports(ROOT / f"{script}.py")}
    assert imports == {f"{COMMANDS}.{script}"}


def test_experiments_and_benchmarks_are_imported_by_their_own_kind_alone():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for room in ("experiments", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
        for name, line in find_imports(path)
        if top(name) in (NEVER_IMPORTED | {COMMANDS}) - {room}
    ]
    assert not wrong


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_files_stand_alone(path):
    """At any depth; a file that lies beside them is found by name when there is one.

    A published file that is imported becomes a part of the one that imports it when this is saved.
    """
    published = {module_of(each) for each in PUBLISHED}
    imports = {name for name, _ in find_imports(path)} - published
    assert {top(name) for name in imports} <= PUBLISHED_MAY_IMPORT


def test_published_files_exist():
    assert {"pipeline_em_ldm.py", "pipeline_em_stylegan.py"} <= {path.name for path in PUBLISHED}
    assert len({path.name for path in PUBLISHED}) == len(PUBLISHED)  # remote code shares one folder


def test_no_import_circle():
    """Imports inside functions count: they would only hide a circle."""
    below = {
        module: {name for name, _ in find_imports(path) if name in modules() and name != module}
        for module, path in modules().items()
    }
    circles = sorted(sorted(circle) for circle in find_circles(below))
    assert not circles


def test_find_circles_finds_one():
    below = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert find_circles(below) == {frozenset("bc")}


def find_circles(below):
    """Return the strongly connected components of more than one node."""
    reach = {node: set(others) for node, others in below.items()}
    for middle in reach:
        for others in reach.values():
            if middle in others:
                others |= reach[middle]
    components = {
        frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in reach if a in reach[a]
    }
    return {component for component in components if len(component) > 1}


def test_no_module_needs_posix():
    """Windows has none of these. Inside a function, after a check of the system, they are fine."""
    wrong = [
        f"{module}: {name}"
        for module, path in modules().items()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else names_of(node))
        if top(name or "") in POSIX_ONLY
    ]
    assert not wrong


def names_of(node):
    return [alias.name for alias in node.names]


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("em_diffusion", "EMLatentDiffusionPipeline"),
        ("em_stylegan", "EMStyleGANPipeline"),
        ("em_cyclegan", "EMTranslationPipeline"),
        ("em_stable_diffusion", "EMLoRAPipeline"),
    ],
)
def test_a_pipeline_imports_no_trainer(package, name):
    """Beyond what diffusers imports itself, only published files."""
    code = f"""
import sys
import diffusers
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, UNet2DModel, VQModel
before = set(sys.modules)
from {package} import {name}
print(*sorted(set(sys.modules) - before))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = result.stdout.split()
    ours = {module for module in imported if top(module) in PACKAGES}
    published = {module_of(path) for path in PUBLISHED}
    # of em_training there is one published file, beside the package itself, which is lazy
    assert ours <= {package, "em_training"} | published
    forbidden = {"accelerate", "datasets", "matplotlib", "scipy", "tensorboard", "tyro"}
    assert not {top(module) for module in imported} & forbidden
