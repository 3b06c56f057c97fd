"""Folders prove themselves: what is not whole does not exist."""

import hashlib
import json
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


def test_a_sealed_folder_verifies_and_its_building_is_gone(tmp_path):
    building = _folder(tmp_path)
    manifest = seal_folder(building, tmp_path / "final", base_digest="sha256:base")
    assert verify_folder(tmp_path / "final") == manifest == read_manifest(tmp_path / "final")
    assert not building.exists()
    assert set(manifest.files) == {"weights", "card"}


def test_the_digest_covers_named_files_and_the_base_alone(tmp_path):
    def digest(number: int, card: bytes, weights: bytes, base: str) -> str:
        building = _folder(tmp_path, f"b{number}", weights=weights, card=card)
        final = tmp_path / f"f{number}"
        return seal_folder(building, final, digested=["weights"], base_digest=base).digest

    first = digest(1, b"one", b"abc", "x")
    assert digest(2, b"another", b"abc", "x") == first
    assert digest(3, b"one", b"abx", "x") != first
    assert digest(4, b"one", b"abc", "y") != first


def test_sealing_replaces_an_older_folder(tmp_path):
    seal_folder(_folder(tmp_path, weights=b"old"), tmp_path / "final")
    seal_folder(_folder(tmp_path, weights=b"new"), tmp_path / "final")
    assert (tmp_path / "final" / "weights").read_bytes() == b"new"


@given(position=st.integers(0, 63), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    seal_folder(_folder(folder, weights=bytes(64)), folder / "final")
    content = bytearray(64)
    content[position] ^= 1 << bit
    (folder / "final" / "weights").write_bytes(bytes(content))
    with pytest.raises(ArtifactCorruptError, match="weights"):
        verify_folder(folder / "final")


@pytest.mark.parametrize("damage", ["missing file", "no manifest", "cut manifest", "other digest"])
def test_a_damaged_folder_is_refused(tmp_path, damage):
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


def test_an_atomic_write_leaves_no_temporary_file(tmp_path):
    write_file_atomically(tmp_path / "a", b"one", mode=0o600)
    write_file_atomically(tmp_path / "a", b"two", mode=0o600)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def _written_by_an_earlier_version(folder: Path, content: bytes, pieces: list[bytes]) -> str:
    """Write a folder whose manifest has the hashes of pieces of a file, as the format once had."""
    folder.mkdir()
    (folder / "weights").write_bytes(content)
    sha256, hashed = hashlib.sha256(content).hexdigest(), [hashlib.sha256(one).hexdigest() for one in pieces]
    covered = {"base": None, "files": {"weights": sha256}, "pieces": {"weights": hashed}}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    digest = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
    entry = {"sha256": sha256, "bytes": len(content), "pieces": hashed}
    manifest = {"digest": digest, "base_digest": None, "digested": ["weights"], "files": {"weights": entry}}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return digest


def test_an_artifact_whose_manifest_lists_pieces_still_verifies_and_keeps_its_digest(tmp_path):
    content = bytes(range(256)) * 4096
    expected = _written_by_an_earlier_version(tmp_path / "a", content, [content[:700_000], content[700_000:]])
    manifest = verify_folder(tmp_path / "a")
    assert manifest.digest == expected
    (tmp_path / "a" / "weights").rename(tmp_path / "weights")
    (tmp_path / "a").joinpath("weights").write_bytes(content[:-1] + b"x")
    with pytest.raises(ArtifactCorruptError, match="weights"):
        verify_folder(tmp_path / "a")
    # Sealed again under another card, it is the same artifact.
    (tmp_path / "weights").replace(tmp_path / "a" / "weights")
    known = {name: manifest.files[name] for name in manifest.digested}
    again = seal_folder(tmp_path / "a", tmp_path / "b", digested=manifest.digested, known=known)
    assert again.digest == expected
    assert verify_folder(tmp_path / "b") == again


def test_a_manifest_of_today_lists_no_pieces(tmp_path):
    seal_folder(_folder(tmp_path, weights=bytes(5 << 20)), tmp_path / "final")
    entries = json.loads((tmp_path / "final" / MANIFEST_NAME).read_text())["files"]
    assert all(set(entry) == {"sha256", "bytes"} for entry in entries.values())
