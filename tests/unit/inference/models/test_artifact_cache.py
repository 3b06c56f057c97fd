"""The server's copies of artifacts: fetched once, healed, never another's, dropped when unused for long."""

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from luthier.core.errors import ArtifactCorruptError
from luthier.inference.models import artifact_cache
from luthier.inference.models.artifact_cache import (
    CachedArtifact,
    drop_orphans,
    drop_unused,
    fetch_artifact,
    find_deleted,
    link_artifact,
    mark_used,
    verify_copy,
)
from luthier.storage.manifests import MANIFEST_NAME, Manifest, seal_folder
from luthier.storage.store import Storage

NAME = "adapter_model.safetensors"


def build(folder: Path, content: bytes) -> Manifest:
    building = folder.with_name(f".{folder.name}")
    building.mkdir(parents=True)
    (building / NAME).write_bytes(content)
    return seal_folder(building, folder, base_digest="sha256:" + "0" * 64)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(f"file://{tmp_path}/objects")


@pytest.fixture
def digest(storage: Storage, tmp_path: Path) -> str:
    """The digest of an artifact that is published at projects/p/a."""
    digest = build(tmp_path / "a", b"weights").digest
    storage.put_folder(tmp_path / "a", "projects/p/a")
    return digest


@pytest.fixture
def copy(tmp_path: Path) -> CachedArtifact:
    build(tmp_path / "a", b"weights")
    return verify_copy(tmp_path / "a")


def test_an_artifact_is_fetched_once_and_again_when_its_copy_is_damaged(tmp_path, storage, digest):
    copy = fetch_artifact(storage, "projects/p/a", digest, tmp_path / "cache")
    storage.delete_prefix("projects/p/a")
    assert fetch_artifact(storage, "projects/p/a", digest, tmp_path / "cache") == copy
    (copy.folder / NAME).write_bytes(b"weightz")
    storage.put_folder(tmp_path / "a", "projects/p/a")
    assert fetch_artifact(storage, "projects/p/a", digest, tmp_path / "cache").folder == copy.folder
    assert (copy.folder / NAME).read_bytes() == b"weights"


def test_another_artifact_under_the_same_key_is_never_taken_for_it(tmp_path, storage):
    wanted = build(tmp_path / "a", b"wanted").digest
    build(tmp_path / "b", b"another")
    storage.put_folder(tmp_path / "b", "projects/p/a")
    with pytest.raises(ArtifactCorruptError):
        fetch_artifact(storage, "projects/p/a", wanted, tmp_path / "cache")
    with pytest.raises(ArtifactCorruptError):
        fetch_artifact(storage, "projects/p/a", "../../etc", tmp_path / "cache")


def test_an_untouched_copy_is_not_read_again_and_a_touched_one_is(copy, monkeypatch):
    verify_folder = Mock(wraps=artifact_cache.verify_folder)
    monkeypatch.setattr(artifact_cache, "verify_folder", verify_folder)
    mark_used(copy.folder)
    copy.check()
    verify_folder.assert_not_called()
    os.utime(copy.folder / NAME)
    copy.check()
    verify_folder.assert_called_once()
    # Same size, same time of change: the inode's own time differs.
    facts = (copy.folder / NAME).stat()
    (copy.folder / NAME).write_bytes(b"weightz")
    os.utime(copy.folder / NAME, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(ArtifactCorruptError):
        copy.check()


def test_a_copy_that_another_replaced_or_that_vanished_is_refused(tmp_path, copy):
    build(tmp_path / "a2", b"another")
    for name in (NAME, MANIFEST_NAME):
        (tmp_path / "a2" / name).replace(copy.folder / name)
    with pytest.raises(ArtifactCorruptError):
        copy.check()
    (copy.folder / NAME).unlink()
    with pytest.raises(ArtifactCorruptError):
        copy.check()


def test_the_copies_unused_for_longest_leave_and_those_in_use_never(tmp_path):
    names = [f"{i:064x}" for i in range(5)]
    for i, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").touch()
        os.utime(tmp_path / name, (1000 + i, 1000 + i))
    mark_used(tmp_path / names[1])
    drop_unused(tmp_path, max_kept=3, in_use={f"sha256:{names[0]}"})
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[1], names[4]}
    drop_unused(tmp_path, max_kept=1, in_use={f"sha256:{name}" for name in names})
    assert len(list(tmp_path.iterdir())) == 3


def test_on_one_disk_a_copy_is_a_second_name_of_what_was_published_and_outlives_it(tmp_path, storage, digest):
    cache = tmp_path / "cache"
    for prefix, wanted in (
        ("projects/p/a", "sha256:" + "1" * 64),
        ("projects/p/none", digest),
        ("../a", digest),
        ("projects/p/a", "../../etc"),
    ):
        assert link_artifact(storage, prefix, wanted, cache) is None
    assert link_artifact(Storage(storage.objects, None), "projects/p/a", digest, cache) is None
    copy = link_artifact(storage, "projects/p/a", digest, cache)
    assert (copy.folder / NAME).samefile(tmp_path / "objects/projects/p/a" / NAME)
    assert copy.stamps is None
    storage.delete_prefix("projects/p/a")
    copy.check()
    assert copy.stamps is not None
    again = link_artifact(storage, "projects/p/a", digest, cache)
    assert again == copy
    (copy.folder / NAME).write_bytes(b"weightz")
    with pytest.raises(ArtifactCorruptError):
        again.check()


def test_where_files_get_no_second_name_nothing_is_left_behind(tmp_path, storage, digest, monkeypatch):

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    assert link_artifact(storage, "projects/p/a", digest, tmp_path / "cache") is None
    assert list((tmp_path / "cache").iterdir()) == []


def link(storage: Storage, tmp_path: Path, name: str) -> CachedArtifact:
    digest = build(tmp_path / name, name.encode()).digest
    storage.put_folder(tmp_path / name, f"projects/p/{name}")
    copy = link_artifact(storage, f"projects/p/{name}", digest, tmp_path / "cache")
    assert copy is not None and copy.folder.is_dir()
    return copy


def test_copies_of_what_is_not_published_any_more_are_distinguished(tmp_path, storage):
    kept, deleted = link(storage, tmp_path, "a"), link(storage, tmp_path, "b")
    fetched = build(tmp_path / "c", b"c").digest
    storage.put_folder(tmp_path / "c", "projects/p/c")
    other = fetch_artifact(storage, "projects/p/c", fetched, tmp_path / "cache")
    unknown = verify_copy(other.folder)
    for name in ("b", "c"):
        storage.delete_prefix(f"projects/p/{name}")
    assert find_deleted(storage, [kept, deleted, other, unknown]) == [deleted, other]


def test_orphans_of_earlier_processes_are_dropped_and_nothing_else_is(tmp_path, storage, monkeypatch):
    cache = tmp_path / "cache"
    drop_orphans(storage, cache, ())
    kept, deleted, known, _ = found = [link(storage, tmp_path, name) for name in "abcd"]
    (cache / "notes").mkdir()
    for name in "bcd":
        storage.delete_prefix(f"projects/p/{name}")
    for copy in (kept, deleted, known):
        os.utime(copy.folder, (0, 0))
    drop_orphans(storage, cache, {known.digest})
    assert [copy.folder.is_dir() for copy in found] == [True, False, True, True]
    assert (cache / "notes").is_dir()
    # Where artifacts are elsewhere each copy has one name.
    monkeypatch.setattr(storage, "local_root", None)
    drop_orphans(storage, cache, ())
    assert known.folder.is_dir()
