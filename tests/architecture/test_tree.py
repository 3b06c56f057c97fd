"""Length of files, and what no file may name."""

import re
import warnings
from collections import Counter
from pathlib import PurePath

from tests.architecture.sources import ROOMS, ROOT, python_files, tracked_files

_MAX_LINES = 600
_MAX_FILES = 15
# Adding a file to these is adding a feature or a migration.
_OPEN_FOLDERS = {
    "db/migrations/versions",
    "luthier/data/formats",
    "luthier/evaluation/graders",
    "luthier/methods",
    "luthier/trackers",
}
# Folders with more files than that; numbers only shrink, and a folder that is below them leaves the list.
_TOO_FULL = {
    "api": 32,
    "api/routes": 16,
    "api/schemas": 18,
    "benchmarks": 16,
    "luthier/cli": 18,
    "luthier/modeling": 16,
    "luthier/training": 39,
    "services": 35,
    "worker": 25,
}
_REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("huggingface", "co"),
        ("npmjs", "org"),
        ("docker", "io"),
        ("ghcr", "io"),
        ("quay", "io"),
    )
]
# Folders of some machine on which the project was written.
_FOREIGN_PATHS = re.compile(r"(?<![\w.-])/(work/|tmp/w\b)")


def test_a_file_has_at_most_600_lines() -> None:
    names = python_files(*ROOMS, "tests", "examples", "benchmarks", "deploy")
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names}
    assert [(name, length) for name, length in lengths.items() if length > _MAX_LINES] == []


def test_a_folder_has_at_most_15_files() -> None:
    roots = (*ROOMS, "luthier_cpu", "benchmarks", "examples")
    counts = Counter(
        str(PurePath(name).parent) for name in tracked_files() if name.split("/")[0] in roots and "/" in name
    )
    limits = {folder: _TOO_FULL.get(folder, _MAX_FILES) for folder in counts.keys() - _OPEN_FOLDERS}
    assert {folder: counts[folder] for folder in limits if counts[folder] > limits[folder]} == {}
    lower = {folder: counts[folder] for folder in _TOO_FULL if counts[folder] < _TOO_FULL[folder]}
    if lower:
        warnings.warn(f"_TOO_FULL may be lowered, to nothing at {_MAX_FILES}: {lower}", stacklevel=1)


def test_no_file_has_a_vague_name() -> None:
    vague = {"utils", "util", "common", "manager", "helper", "helpers", "handle", "misc"}
    assert not [name for name in tracked_files() if vague & set(re.split(r"[/._]", name))]


def test_no_file_names_a_registry_or_a_folder_of_another_machine() -> None:
    for name in tracked_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        assert not [host for host in _REGISTRY_HOSTS if host in text], name
        found = _FOREIGN_PATHS.search(text)
        assert found is None, f"{name}: {found}"
