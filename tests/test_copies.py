"""What published files repeat, because each must load by itself, is the same in all of them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MARK = re.compile(
    r"^ *# Copied from ((?:em_\w+)(?:\.\w+)+)\n(?: *@.*\n)*? *(?:def|class) (\w+)", re.M
)
FILES = sorted(ROOT.glob("em_*/**/*.py"))
COPIES = [(path, *match.groups()) for path in FILES for match in MARK.finditer(path.read_text())]


def find_definition(path, names):
    """Return the text of the definition with a qualified name, as Python reads it."""
    node = ast.parse(path.read_text())
    for name in names:
        found = [child for child in node.body if getattr(child, "name", None) == name]
        assert found, f"{path} has no {'.'.join(names)}"
        node = found[0]
    return ast.unparse(node)


def test_every_mark_is_understood():
    marks = sum(path.read_text().count("# Copied from") for path in FILES)
    assert marks == len(COPIES) > 10


@pytest.mark.parametrize(
    ("path", "source", "name"), COPIES, ids=[f"{path.stem}-{name}" for path, _, name in COPIES]
)
def test_copy_equals_its_source(path, source, name):
    package, module, *names = source.split(".")
    assert names[-1] == name
    original = find_definition(ROOT / package / f"{module}.py", names)
    # the copy stands in the class of the same depth
    tree = ast.parse(path.read_text())
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    copies = [ast.unparse(n) for body in bodies for n in body if getattr(n, "name", None) == name]
    assert original in copies, f"{path.name}: {name} differs from {source}"
