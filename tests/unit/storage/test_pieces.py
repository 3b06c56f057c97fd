"""Large files are checked piece by piece, by several threads, and nothing that is not theirs passes."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from luthier.core.errors import ArtifactCorruptError
from luthier.inference.copies import _copy_in
from luthier.storage.manifests import MANIFEST_NAME, read_manifest, seal_folder, verify_folder
from luthier.storage.pieces import are_pieces, piece_bytes

MIB = 1 << 20
SIZE = 5 * MIB + 3


def seal(folder: Path, content: bytes, *, in_pieces: bool = True) -> Path:
    building = folder.with_name(f".{folder.name}")
    building.mkdir()
    (building / "weights").write_bytes(content)
    (building / "small").write_bytes(b"small")
    seal_folder(building, folder, in_pieces=in_pieces)
    return folder


def pieces_of(folder: Path, content: bytes) -> list[str] | None:
    return read_manifest(seal(folder, content)).files["weights"].pieces


def test_pieces_are_few_and_cover_a_file(tmp_path: Path) -> None:
    assert [piece_bytes(size) for size in (1, SIZE, 128 * MIB, 128 * MIB + 1, 14_000 * MIB)] == [
        2 * MIB,
        2 * MIB,
        2 * MIB,
        3 * MIB,
        219 * MIB,
    ]
    content = os.urandom(SIZE)
    for size in (SIZE, 4 * MIB):
        parts = [content[first : min(size, first + 2 * MIB)] for first in range(0, size, 2 * MIB)]
        found = pieces_of(tmp_path / str(size), content[:size])
        assert found == [hashlib.sha256(part).hexdigest() for part in parts]
    assert pieces_of(tmp_path / "b", content[: 2 * MIB]) is None
    assert pieces_of(tmp_path / "c", b"") is None


@pytest.mark.parametrize("num_threads", [1, 2, 5, None])
def test_a_changed_bit_of_any_piece_is_found_by_any_number_of_threads(
    tmp_path: Path, num_threads: int | None
) -> None:
    content = bytearray(os.urandom(SIZE))
    expected = pieces_of(tmp_path / "a", bytes(content))
    assert expected is not None
    assert are_pieces(memoryview(content), expected, num_threads)
    for place in (0, 2 * MIB - 1, 2 * MIB, 4 * MIB + 5, SIZE - 1):
        content[place] ^= 1
        assert not are_pieces(memoryview(content), expected, num_threads)
        content[place] ^= 1
    for wrong in ([], expected[:-1], [*expected, expected[-1]], expected[::-1]):
        assert not are_pieces(memoryview(content), wrong, num_threads)
    assert not are_pieces(memoryview(content)[:-1], expected, num_threads)
    assert are_pieces(memoryview(content), expected, num_threads)


def test_a_copy_is_checked_by_its_pieces_which_its_digest_covers(tmp_path: Path) -> None:
    folder = seal(tmp_path / "a", os.urandom(SIZE))
    manifest = read_manifest(folder)
    assert manifest == verify_folder(folder)
    found = manifest.files["weights"].pieces
    assert found is not None and len(found) == 3 and manifest.files["small"].pieces is None
    _copy_in(folder).check()
    # Pieces of other bytes, beside the whole file's own hash.
    other = seal(tmp_path / "b", os.urandom(SIZE))
    told = json.loads((folder / MANIFEST_NAME).read_text())
    told["files"]["weights"]["pieces"] = read_manifest(other).files["weights"].pieces
    (folder / MANIFEST_NAME).write_text(json.dumps(told))
    (folder / "weights").write_bytes((other / "weights").read_bytes())
    with pytest.raises(ArtifactCorruptError, match="digest"):
        _copy_in(folder).check()


@pytest.mark.parametrize("in_pieces", [True, False])
@pytest.mark.parametrize("place", [0, 3 * MIB, SIZE - 1])
def test_a_damaged_copy_is_refused_with_or_without_pieces(
    tmp_path: Path, in_pieces: bool, place: int
) -> None:
    folder = seal(tmp_path / "a", os.urandom(SIZE), in_pieces=in_pieces)
    copy = _copy_in(folder)
    copy.check()
    content = bytearray((folder / "weights").read_bytes())
    content[place] ^= 1
    (folder / "weights").write_bytes(content)
    with pytest.raises(ArtifactCorruptError, match="weights does not match"):
        copy.check()
    (folder / "weights").write_bytes(content[:-1])
    with pytest.raises(ArtifactCorruptError, match="weights does not match"):
        copy.check()
    (folder / "weights").unlink()
    with pytest.raises(ArtifactCorruptError, match="weights does not match"):
        copy.check()


def test_a_manifest_without_pieces_is_what_it_always_was(tmp_path: Path) -> None:
    folder = seal(tmp_path / "a", b"weights of old", in_pieces=False)
    told = json.loads((folder / MANIFEST_NAME).read_text())
    assert all(set(entry) == {"sha256", "bytes"} for entry in told["files"].values())
    hashes = {name: entry["sha256"] for name, entry in told["files"].items()}
    canonical = json.dumps({"base": None, "files": hashes}, sort_keys=True, separators=(",", ":"))
    assert told["digest"] == "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
    assert told["base_digest"] is None
