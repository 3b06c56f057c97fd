"""Imports run down only, and torch stays in the two processes that compute."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.architecture.sources import ROOT, python_files, tree_of

_HEAVY = ("torch", "transformers", "peft")
# Imports every module below the packages but those that run when imported, then says what got in.
_PROBE = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_every_service_but_the_task_queue_is_held_to_name_no_celery() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [held] = [
        set(entry["source_modules"]) for entry in contracts if entry["name"].startswith("celery is named")
    ]
    services = {f"services.{path.stem}" for path in (ROOT / "services").glob("*.py")}
    assert services - held == {"services.__init__", "services.task_queue"}


@pytest.mark.parametrize(
    "packages",
    [
        ("api", "luthier.serving"),
        ("worker", "services", "db.migrate"),
        ("luthier.cli", "luthier.client"),
    ],
    ids=["api", "worker", "cli"],
)
def test_a_process_of_the_service_never_loads_torch(packages: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *packages], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_scheduler_of_sequences_loads_no_torch() -> None:
    program = "import luthier.inference.engine.scheduler, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def _imported_at_the_top(name: str) -> set[str]:
    found: set[str] = set()
    for statement in tree_of(name).body:
        if isinstance(statement, ast.Import):
            found |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            found.add((statement.module or "").split(".")[0])
    return found


# What begins with `_` is imported lazily, which the test above holds.
@pytest.mark.parametrize(
    "name", [name for name in python_files("luthier/methods") if not Path(name).name.startswith("_")]
)
def test_a_methods_file_imports_no_torch_at_its_top(name: str) -> None:
    assert not _imported_at_the_top(name) & set(_HEAVY)


@pytest.mark.parametrize("name", python_files("services"))
def test_services_move_no_bytes(name: str) -> None:
    modules = {node.module or "" for node in ast.walk(tree_of(name)) if isinstance(node, ast.ImportFrom)} | {
        alias.name for node in ast.walk(tree_of(name)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert not [m for m in modules if m.startswith(("luthier.storage", "obstore", "httpx2", "shutil"))]


def test_constraints_pin_every_dependency_but_torch_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [Requirement(text) for text in project["dependencies"]]
    declared += [Requirement(text) for texts in project["optional-dependencies"].values() for text in texts]
    pinned: dict[str, set[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement = Requirement(line)
        [exact] = requirement.specifier
        pinned.setdefault(canonicalize_name(requirement.name), set()).add(Version(exact.version))
    for requirement in declared:
        if requirement.name != "torch":
            versions = pinned[canonicalize_name(requirement.name)]
            assert all(version in requirement.specifier for version in versions), requirement
