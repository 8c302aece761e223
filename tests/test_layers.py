"""Imports go down the floors, never up and never sideways."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("experiments", "lit_embed", "lit_rl", "lit_core")
MAY_IMPORT = {
    "lit_core": {"lit_core"},
    "lit_embed": {"lit_embed", "lit_core"},
    "lit_rl": {"lit_rl", "lit_core"},
    "experiments": {"experiments", "lit_embed", "lit_rl", "lit_core"},
}
INSIDE = {  # folder of a package -> folders of the same package that it must not import
    "kernels": {"functional", "modules", "data", "retrieval", "rewards", "callbacks", "methods"},
    "functional": {"modules", "data", "retrieval", "rewards", "callbacks", "methods"},
    "modules": {"data", "callbacks", "methods"},
    "retrieval": {"modules", "data", "callbacks", "methods"},
    "data": {"modules", "callbacks", "methods"},
    "methods": {"data", "callbacks"},
}
LIBRARIES = {  # folder of a package -> all that it may import besides
    "functional": {"torch", "typing", "collections", "dataclasses", "math"},
    "kernels": {"numba", "numpy", "math"},
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_is_below_it(path: Path) -> None:
    package, *folders = path.relative_to(ROOT).parts
    forbidden_folders = INSIDE.get(folders[0], set())
    for module in imported(path):
        top, *rest = module.split(".")
        if top in PACKAGES:
            assert top in MAY_IMPORT[package], f"{package} must not import {module}"
            assert not (top == package and rest and rest[0] in forbidden_folders), f"{path} must not import {module}"
        elif folders[0] in LIBRARIES:
            assert top in LIBRARIES[folders[0]], f"{folders[0]} must not import {module}"


def test_files_fit_one_sitting() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long
