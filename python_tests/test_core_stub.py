"""The stub of the native module declares what the module has, argument by argument."""

from __future__ import annotations

import ast
import importlib.resources
import re
from collections.abc import Iterator
from types import ModuleType

import pytest

from flame_ext import _core

Signatures = set[tuple[str, ...]]  # of a function's overloads


def declared() -> dict[str, Signatures]:
    stub = importlib.resources.files("flame_ext").joinpath("_core.pyi").read_text()
    found: dict[str, Signatures] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = tuple(a.arg for a in arguments if a.arg != "self")
                found.setdefault(prefix + node.name, set()).add(names)

    visit(ast.parse(stub).body, "")
    return found


def bound() -> dict[str, Signatures]:
    def members(owner: ModuleType | type, prefix: str) -> Iterator[tuple[str, object]]:
        for name in vars(owner):
            value = getattr(owner, name)
            if isinstance(value, type):
                yield from members(value, f"{name}.")
            elif not name.startswith("_") or (name == "__init__" and has_constructor(owner)):
                yield prefix + name, value

    found = dict(members(_core, ""))
    return {name: signatures(name, found[name]) for name in found if not is_launcher(name)}


def has_constructor(owner: object) -> bool:
    return str(owner.__init__.__doc__).startswith("__init__(")


def is_launcher(name: str) -> bool:
    """Of a CUDA kernel, on device pointers: only in a build with CUDA."""
    return name.startswith("cuda_") and name not in ("cuda_devices", "cuda_problem")


def signatures(name: str, value: object) -> Signatures:
    """As pybind11 writes them into a docstring: one line, or for overloads one each."""
    if isinstance(value, property):
        return {()}
    function = re.escape(name.rpartition(".")[2])
    line = rf"^(?:\d+\. )?{function}\((?!\*args, \*\*kwargs)(.*)\)(?: -> .*)?$"
    return {argument_names(text) for text in re.findall(line, value.__doc__ or "", re.MULTILINE)}


def argument_names(line: str) -> tuple[str, ...]:
    flat = line
    while (shorter := re.sub(r"\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}", "", flat)) != flat:
        flat = shorter  # commas of types and of defaults
    names = (re.split("[:=]", part)[0].strip() for part in flat.split(",") if part.strip())
    return tuple(name for name in names if name not in ("self", "*", "/"))


def test_the_stub_names_everything() -> None:
    assert declared().keys() == bound().keys()


@pytest.mark.parametrize("name", sorted(declared()))
def test_a_declaration_has_the_arguments_that_are_bound(name: str) -> None:
    assert declared()[name] == bound()[name]
