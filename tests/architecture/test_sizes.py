"""Budgets of lines: the product as a whole, and what the inference server imports."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.architecture.sources import ROOMS, ROOT, python_files, tree_of

# Numbers only shrink: to 45,000 and 12,000.
_MAX_PRODUCT_LINES = 45_400
_MAX_SERVER_LINES = 13_350
_SERVER = "luthier.inference.server"


def _num_lines(name: str) -> int:
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


@cache
def _modules() -> dict[str, str]:
    """Return the file of every module of the product."""
    return {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name
        for name in python_files(*ROOMS)
    }


def _is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without what only type checkers read."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr) and not _is_for_types_only(child):
            yield from _statements(child)


def _imported_by(module: str) -> set[str]:
    """Return the modules that one imports, inside functions too, and the packages above them."""
    path = Path(_modules()[module])
    found: set[str] = set()
    for node in _statements(tree_of(str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    found &= _modules().keys()
    found |= {".".join(name.split(".")[:depth]) for name in found for depth in range(1, name.count(".") + 1)}
    return found & _modules().keys()


def closure_of(start: str) -> set[str]:
    """Return the modules of the product that importing and running one may load."""
    waiting = [name for name in (start, f"{start}.__main__") if name in _modules()]
    assert waiting, start
    found = set(waiting)
    while waiting:
        new = _imported_by(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def test_the_product_does_not_grow() -> None:
    lines = {room: sum(map(_num_lines, python_files(room))) for room in ROOMS}
    print(
        f"product lines: {sum(lines.values())} {lines}; tests: {sum(map(_num_lines, python_files('tests')))}"
    )
    assert sum(lines.values()) <= _MAX_PRODUCT_LINES, lines


def test_the_inference_servers_imports_do_not_grow() -> None:
    modules = closure_of(_SERVER)
    lines = sum(_num_lines(_modules()[name]) for name in modules)
    print(f"imports of the inference server: {len(modules)} modules, {lines} lines")
    assert lines <= _MAX_SERVER_LINES, f"{lines} lines in {len(modules)} modules"
