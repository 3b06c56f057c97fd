"""Parts put together over a store that is no folder: whole and checked, or nothing of it."""

import asyncio
import hashlib

import pytest
from obstore.store import MemoryStore

from api.uploads.object_writer import StoredBytes
from api.uploads.part_upload import assemble
from luthier.core.errors import ArtifactCorruptError, InvalidFileFormatError, InvalidValueError
from luthier.data.readers.base import Limits
from luthier.data.readers.upload_check import UploadCheck
from luthier.storage.store import Storage
from services.files.uploads import StoredPart
from tests.rows import colour_rows, jsonl

ROWS = jsonl(colour_rows(30))
MD5 = hashlib.md5(ROWS).hexdigest()


def _stored(storage: Storage, *pieces: bytes) -> list[StoredPart]:
    parts = [StoredPart(f"part_{n}", len(piece), f"u/part_{n}") for n, piece in enumerate(pieces)]
    for part, piece in zip(parts, pieces, strict=True):
        storage.put_bytes(part.storage_key, piece)
    return parts


def _assemble(storage: Storage, parts: list[StoredPart], md5: str | None = None) -> StoredBytes:
    check = UploadCheck("fine-tune", Limits(1 << 20))
    return asyncio.run(assemble(storage, parts, check=check, md5=md5, storage_key="u/file"))


def _keys(storage: Storage) -> list[str]:
    return sorted(meta["path"] for batch in storage.objects.list() for meta in batch)


def test_parts_become_one_object_in_the_order_named():
    storage = Storage(MemoryStore(), None)
    last, first = _stored(storage, ROWS[777:], ROWS[:777])
    facts = _assemble(storage, [first, last], MD5)
    assert facts == (30, len(ROWS), hashlib.sha256(ROWS).hexdigest(), "chat")
    assert storage.objects.get("u/file").bytes().to_bytes() == ROWS


@pytest.mark.parametrize(
    ("pieces", "md5", "error", "param"),
    [
        ([ROWS, b"{}\n"], None, InvalidFileFormatError, "part_ids"),
        ([ROWS, b"{}\n" * 500_000], None, InvalidFileFormatError, "part_ids"),
        ([ROWS, ROWS], MD5, InvalidValueError, "md5"),
    ],
    ids=["told at the end", "told early", "md5"],
)
def test_what_is_refused_leaves_the_parts_and_nothing_else(pieces, md5, error, param):
    storage = Storage(MemoryStore(), None)
    parts = _stored(storage, *pieces)
    with pytest.raises(error) as caught:
        _assemble(storage, parts, md5)
    assert caught.value.param == param
    assert _keys(storage) == ["u/part_0", "u/part_1"]


def test_a_part_that_is_missing_leaves_nothing():
    storage = Storage(MemoryStore(), None)
    [part] = _stored(storage, ROWS)
    with pytest.raises(ArtifactCorruptError):
        _assemble(storage, [part, StoredPart("part_1", 5, "u/part_1")])
    assert _keys(storage) == ["u/part_0"]
