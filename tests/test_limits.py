"""Limits of the house (CONTRIBUTING.md): lines of a function, of a file, and columns of a line."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent.name for path in ROOT.glob("em_*/__init__.py"))
FUNCTION_LINES, LOOP_LINES, FILE_LINES, COLUMNS = 60, 100, 400, 100


def find_functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def is_published(path):
    return path.name.startswith(("em_", "pipeline_em_"))


def is_loop(path, name):
    return path.stem.endswith("loop") and name.startswith("train_")


@pytest.mark.parametrize("room", ROOMS)
def test_limits(room):
    wrong = []
    for path in sorted((ROOT / room).rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        name = path.relative_to(ROOT)
        if len(lines) > FILE_LINES and not is_published(path):
            wrong.append(f"{name}: {len(lines)} lines, more than {FILE_LINES}")
        wrong += [
            f"{name}:{number}: {len(line)} columns, more than {COLUMNS}"
            for number, line in enumerate(lines, 1)
            if len(line) > COLUMNS
        ]
        for function, length in find_functions(path):
            limit = LOOP_LINES if is_loop(path, function) else FUNCTION_LINES
            if length > limit:
                wrong.append(f"{name}: {function} has {length} lines, more than {limit}")
    assert not wrong, "\n".join(wrong)
