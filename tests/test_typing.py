"""Every public function and method states the types of its arguments and of its result."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUBS = sorted(ROOT.glob("em_*/__init__.pyi"))
SPECIAL = {"__init__", "__call__", "__len__", "__getitem__", "__iter__", "__enter__", "__exit__"}


def find_public(stub):
    """Yield (file, class or function) for the names that a package's stub exports."""
    for node in ast.parse(stub.read_text()).body:
        path = stub.parent / f"{node.module}.py"
        wanted = {alias.name for alias in node.names}
        for item in ast.parse(path.read_text()).body:
            if getattr(item, "name", None) in wanted:
                yield path, item


def find_untyped(function, method):
    """Return the arguments without a type, and "return"."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    static = any(getattr(each, "id", "") == "staticmethod" for each in function.decorator_list)
    named = named[1:] if method and not static else named
    named += [*arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    untyped = [each.arg for each in named if each is not None and each.annotation is None]
    if function.returns is None and function.name != "__init__":
        untyped.append("return")
    return untyped


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_public_signatures_are_typed(stub):
    wrong = []
    for path, item in find_public(stub):
        functions = [(item, False)]
        if isinstance(item, ast.ClassDef):
            methods = [each for each in item.body if isinstance(each, ast.FunctionDef)]
            functions = [
                (each, True)
                for each in methods
                if not each.name.startswith("_") or each.name in SPECIAL
            ]
        elif not isinstance(item, ast.FunctionDef):
            continue
        for function, method in functions:
            if untyped := find_untyped(function, method):
                owner = f"{item.name}." if method else ""
                wrong.append(f"{path.name}: {owner}{function.name}: {', '.join(untyped)}")
    assert not wrong, "\n".join(wrong)
