"""Sealed folders within sealed folders, and back."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.storage.manifests import seal_folder, verify_folder
from luthier.training.output.hardlink import link_folder, pack_folder, unpack_folder


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    building = tmp_path / ".building"
    (building / "nested").mkdir(parents=True)
    (building / "weights").write_bytes(b"numbers")
    (building / "nested" / "card").write_bytes(b"words")
    seal_folder(building, tmp_path / "sealed", digested=["weights"], base_digest="sha256:0")
    return tmp_path / "sealed"


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_linked_folder_takes_no_room_and_outlives_the_first(sealed, tmp_path):
    manifest = verify_folder(sealed)
    link_folder(sealed, tmp_path / "second")
    assert (tmp_path / "second" / "weights").samefile(sealed / "weights")
    (sealed / "weights").unlink()
    assert verify_folder(tmp_path / "second") == manifest


def test_what_is_packed_into_a_folder_is_sealed_with_it_and_comes_out_as_it_was(sealed, tmp_path):
    around = tmp_path / ".around"
    around.mkdir()
    pack_folder(sealed, around / "kept")
    outer = seal_folder(around, tmp_path / "around")
    # All of it is listed, its own manifest too.
    assert sorted(outer.files) == ["kept/nested/card", "kept/seal.json", "kept/weights"]
    unpack_folder(tmp_path / "around" / "kept", tmp_path / "out")
    assert verify_folder(tmp_path / "out") == verify_folder(sealed)
    assert verify_folder(tmp_path / "around") == outer


def test_a_file_system_without_hard_links_gets_copies(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    link_folder(sealed, tmp_path / "second")
    assert verify_folder(tmp_path / "second") == verify_folder(sealed)
    assert not (tmp_path / "second" / "weights").samefile(sealed / "weights")


def test_a_full_disk_is_called_by_its_name(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.ENOSPC))
    monkeypatch.setattr("luthier.training.output.hardlink.shutil.copyfile", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as raised:
        link_folder(sealed, tmp_path / "second")
    assert raised.value.errno == errno.ENOSPC
