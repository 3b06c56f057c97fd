"""Length of files, and what no file may name."""

import re
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
    for folder in _OPEN_FOLDERS:
        counts.pop(folder, None)
    assert {folder: count for folder, count in counts.items() if count > _MAX_FILES} == {}


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
