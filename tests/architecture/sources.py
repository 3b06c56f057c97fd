"""The project's own files, for tests that read them."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("luthier", "services", "db", "api", "worker")


@cache
def tracked_files() -> tuple[str, ...]:
    """Return the paths of every file that git knows or would take, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def python_files(*folders: str) -> list[str]:
    """Return the Python files below the folders, relative to the root."""
    found = [
        name
        for name in tracked_files()
        if name.endswith(".py") and name.startswith(tuple(f"{f}/" for f in folders))
    ]
    assert found, folders
    return found


@cache
def tree_of(name: str) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)
