"""Folders prove themselves: what is not whole does not exist."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ArtifactCorruptError
from luthier.storage.manifests import (
    MANIFEST_NAME,
    read_manifest,
    seal_folder,
    verify_folder,
    write_file_atomically,
)


def _folder(parent: Path, name: str = "building", **files: bytes) -> Path:
    folder = parent / name
    folder.mkdir()
    for file, content in (files or {"weights": b"abc", "card": b"text"}).items():
        (folder / file).write_bytes(content)
    return folder


def test_a_sealed_folder_verifies_and_its_building_is_gone(tmp_path: Path) -> None:
    building = _folder(tmp_path)
    manifest = seal_folder(building, tmp_path / "final", base_digest="sha256:base")
    assert verify_folder(tmp_path / "final") == manifest == read_manifest(tmp_path / "final")
    assert not building.exists()
    assert set(manifest.files) == {"weights", "card"}


def test_the_digest_covers_named_files_and_the_base_alone(tmp_path: Path) -> None:
    def digest(number: int, card: bytes, weights: bytes, base: str) -> str:
        building = _folder(tmp_path, f"b{number}", weights=weights, card=card)
        final = tmp_path / f"f{number}"
        return seal_folder(building, final, digested=["weights"], base_digest=base).digest

    first = digest(1, b"one", b"abc", "x")
    assert digest(2, b"another", b"abc", "x") == first
    assert digest(3, b"one", b"abx", "x") != first
    assert digest(4, b"one", b"abc", "y") != first


def test_sealing_replaces_an_older_folder(tmp_path: Path) -> None:
    seal_folder(_folder(tmp_path, weights=b"old"), tmp_path / "final")
    seal_folder(_folder(tmp_path, weights=b"new"), tmp_path / "final")
    assert (tmp_path / "final" / "weights").read_bytes() == b"new"


@given(position=st.integers(0, 63), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flip")
    seal_folder(_folder(folder, weights=bytes(64)), folder / "final")
    content = bytearray(64)
    content[position] ^= 1 << bit
    (folder / "final" / "weights").write_bytes(bytes(content))
    with pytest.raises(ArtifactCorruptError, match="weights"):
        verify_folder(folder / "final")


@pytest.mark.parametrize("damage", ["missing file", "no manifest", "cut manifest", "other digest"])
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    manifest = seal_folder(_folder(tmp_path), tmp_path / "final")
    path = tmp_path / "final" / MANIFEST_NAME
    if damage == "missing file":
        (tmp_path / "final" / "card").unlink()
    elif damage == "no manifest":
        path.unlink()
    elif damage == "cut manifest":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        forged = manifest.model_copy(update={"digest": "sha256:" + "0" * 64})
        path.write_text(forged.model_dump_json())
    with pytest.raises(ArtifactCorruptError):
        verify_folder(tmp_path / "final")


def test_an_atomic_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_file_atomically(tmp_path / "a", b"one", mode=0o600)
    write_file_atomically(tmp_path / "a", b"two", mode=0o600)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
