"""Interpreters with packages of their own, for clients that must not share ours."""

import subprocess
import venv
from pathlib import Path


def make_environment(folder: Path, *requirements: str) -> Path:
    """Return the interpreter of a fresh environment with some packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True)
    return python


def make_node_folder(folder: Path, *packages: str) -> Path:
    """Return a fresh folder whose Node programs find some packages."""
    folder.mkdir()
    command = ["npm", "install", "--no-fund", "--no-audit", "--silent", *packages]
    subprocess.run(command, cwd=folder, check=True)
    return folder
