"""Sealed folders within sealed folders, and back."""

import errno
import os
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


def test_a_linked_folder_takes_no_room_and_outlives_the_first(sealed: Path, tmp_path: Path) -> None:
    manifest = verify_folder(sealed)
    link_folder(sealed, tmp_path / "second")
    assert (tmp_path / "second" / "weights").samefile(sealed / "weights")
    (sealed / "weights").unlink()
    assert verify_folder(tmp_path / "second") == manifest


def test_what_is_packed_into_a_folder_is_sealed_with_it_and_comes_out_as_it_was(
    sealed: Path, tmp_path: Path
) -> None:
    around = tmp_path / ".around"
    around.mkdir()
    pack_folder(sealed, around / "kept")
    outer = seal_folder(around, tmp_path / "around")
    # All of it is listed, its own manifest too.
    assert sorted(outer.files) == ["kept/nested/card", "kept/seal.json", "kept/weights"]
    unpack_folder(tmp_path / "around" / "kept", tmp_path / "out")
    assert verify_folder(tmp_path / "out") == verify_folder(sealed)
    assert verify_folder(tmp_path / "around") == outer


def test_a_file_system_without_second_names_gets_copies(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    link_folder(sealed, tmp_path / "second")
    assert verify_folder(tmp_path / "second") == verify_folder(sealed)
    assert not (tmp_path / "second" / "weights").samefile(sealed / "weights")


def test_a_full_disk_is_called_by_its_name(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("luthier.training.output.hardlink.shutil.copyfile", refuse)
    with pytest.raises(OSError, match="No space left") as raised:
        link_folder(sealed, tmp_path / "second")
    assert raised.value.errno == errno.ENOSPC
