"""An ordinary wheel of the project works outside of the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.stack import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of the project installs."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what git tracks, for building leaves folders beside the sources.
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    (folder / "source").mkdir()
    subprocess.run(["tar", "-x"], cwd=folder / "source", input=archive, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "installed")
    return folder / "installed"


def _run(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_catalogue_of_bases_comes_with_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert "smollm2-135m-instruct" in _run(installed, tmp_path, "-m", "luthier.cli.main", "bases", "list")


def test_every_file_that_the_code_reads_comes_with_the_wheel(installed: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rooms = ("api/", "db/", "luthier/", "services/", "worker/")
    wanted = [name for name in tracked.splitlines() if name.startswith(rooms)]
    assert [name for name in wanted if not (installed / name).exists()] == []


def test_the_migrations_that_run_are_the_wheels(installed: Path, tmp_path: Path) -> None:
    code = "import db.migrate, pathlib; print(pathlib.Path(db.migrate.__file__).resolve())"
    assert Path(_run(installed, tmp_path, "-c", code).strip()).is_relative_to(installed)
