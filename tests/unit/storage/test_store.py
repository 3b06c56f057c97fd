"""Storage over a local folder: objects and published folders, whole or not at all."""

import asyncio
import json
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from luthier.core.errors import ArtifactCorruptError, LuthierError, UnavailableError
from luthier.storage.manifests import MANIFEST_NAME, Manifest, compute_digest, seal_folder
from luthier.storage.store import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(f"file://{tmp_path}/objects")


@pytest.fixture
def published(storage: Storage, tmp_path: Path) -> Manifest:
    """A folder that is published at `p`."""
    return storage.put_folder(_sealed(tmp_path), "p")


def _sealed(parent: Path, content: bytes = b"abc") -> Path:
    building = parent / "building"
    building.mkdir()
    (building / "weights").write_bytes(content)
    seal_folder(building, parent / "sealed")
    return parent / "sealed"


def _keys(storage: Storage) -> list[str]:
    files = (path for path in storage.local_root.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(storage.local_root)) for path in files)


def test_an_object_is_held_as_a_local_file_wherever_it_is(storage):
    for one in (storage, Storage(MemoryStore(), None)):
        one.put_bytes("a/b", b"abc")
        with one.local_file("a/b") as path:
            assert path.read_bytes() == b"abc"
        assert path.exists() == (one is storage)
        with pytest.raises(ArtifactCorruptError), one.local_file("a/c"):
            pass


def test_a_written_object_reads_back_in_ranges(storage):
    content = bytes(range(256)) * 20_000

    async def roundtrip() -> bytes:
        sink = storage.open_sink("a/b")
        for start in range(0, len(content), 70_000):
            await sink.write(content[start : start + 70_000])
        await sink.close()
        return b"".join([chunk async for chunk in storage.stream("a/b", start=3, end=len(content) - 5)])

    assert asyncio.run(roundtrip()) == content[3:-5]


@pytest.mark.parametrize("num_bytes", [0, 10, 20_000_000])
def test_an_aborted_object_leaves_nothing(storage, num_bytes):
    async def abort() -> None:
        sink = storage.open_sink("a/b")
        if num_bytes:
            await sink.write(bytes(num_bytes))
        await sink.abort()

    asyncio.run(abort())
    assert _keys(storage) == []


def test_a_published_folder_comes_back_verified(storage, tmp_path, published):
    assert storage.put_folder(tmp_path / "sealed", "p") == published
    assert storage.fetch_folder("p", tmp_path / "copy") == published
    assert (tmp_path / "copy" / "weights").read_bytes() == b"abc"


@pytest.mark.usefixtures("published")
def test_another_folder_never_replaces_a_published_one(storage, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtifactCorruptError, match="Another folder"):
        storage.put_folder(_sealed(tmp_path / "other", b"different"), "p")


@pytest.mark.parametrize("fault", ["changed", "without a manifest", "a linked file", "a linked folder"])
@pytest.mark.usefixtures("published")
def test_a_folder_that_is_not_as_it_was_published_is_never_fetched(storage, tmp_path, fault):
    if fault == "changed":
        storage.put_bytes("p/weights", b"abx")
    elif fault == "without a manifest":
        storage.delete(f"p/{MANIFEST_NAME}")
    else:
        linked = storage.local_root / ("p" if fault == "a linked folder" else "p/weights")
        linked.rename(tmp_path / "elsewhere")
        linked.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactCorruptError, match={"changed": "weights"}.get(fault, "missing|published")):
        storage.fetch_folder("p", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "name",
    ["../out", "/tmp/out", "a/../../out", "a//b", "./a", "a#1", "manifest.json", "", "a\\b", "a" * 201],
)
@pytest.mark.usefixtures("published")
def test_a_manifest_that_names_a_path_elsewhere_is_refused_and_nothing_is_written(storage, tmp_path, name):
    entry = {"sha256": "0" * 64, "bytes": 3}
    (tmp_path / "objects" / "out").write_bytes(b"abc")
    for files, digested in (({name: entry}, [name]), ({"weights": entry}, [name])):
        content = {"digest": "sha256:0", "base_digest": None, "digested": digested, "files": files}
        (storage.local_root / "p" / MANIFEST_NAME).write_text(json.dumps(content))
        with pytest.raises(ArtifactCorruptError, match="No artifact is published"):
            storage.fetch_folder("p", tmp_path / "copies" / "copy")
    assert not (tmp_path / "copies").exists()


def test_a_manifest_whose_hashes_are_right_writes_nothing_outside_of_its_folder(storage, tmp_path, published):
    (storage.local_root / "out").write_bytes(b"abc")
    files = {"../out": published.files["weights"]}
    forged = Manifest.model_construct(
        digest=compute_digest(files, list(files), None), base_digest=None, digested=list(files), files=files
    )
    (storage.local_root / "p" / MANIFEST_NAME).write_bytes(forged.to_json())
    with pytest.raises(ArtifactCorruptError):
        storage.fetch_folder("p", tmp_path / "copies" / "copy")
    assert not (tmp_path / "copies").exists()


def test_a_link_is_no_file_of_a_published_folder(storage, tmp_path):
    folder = _sealed(tmp_path)
    (folder / "weights").rename(tmp_path / "elsewhere")
    (folder / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactCorruptError, match="does not match"):
        storage.put_folder(folder, "p")


def test_deleting_keeps_what_is_to_be_kept(storage):
    for key in ("p/jobs/1/e1/prepared/rows", "p/jobs/1/e2/artifact/weights", "p/jobs/10/rows"):
        storage.put_bytes(key, b"x")
    storage.put_bytes("p/jobs/1/e2/step_metrics.csv", b"x")
    storage.put_bytes("p/jobs/1/e1/step_metrics.csv", b"x")
    storage.delete_all_but("p/jobs/1", ["p/jobs/1/e2/artifact", "p/jobs/1/e2/step_metrics.csv"])
    assert _keys(storage) == [
        "p/jobs/1/e2/artifact/weights",
        "p/jobs/1/e2/step_metrics.csv",
        "p/jobs/10/rows",
    ]
    storage.delete_prefix("p/jobs/1")
    assert _keys(storage) == ["p/jobs/10/rows"]
    storage.delete("never/was")


def test_a_storage_that_fails_is_distinguished_from_one_that_lacks_an_object(storage, tmp_path):
    (storage.local_root / "models").write_text("a file where a folder should be")
    with pytest.raises(UnavailableError):
        storage.put_folder(_sealed(tmp_path), "models/one")
    with pytest.raises(UnavailableError):
        storage.put_bytes("models/one", b"x")


def test_an_unknown_scheme_is_refused():
    with pytest.raises(LuthierError, match="LUTHIER_STORAGE_URL"):
        Storage.open("ftp://somewhere")
