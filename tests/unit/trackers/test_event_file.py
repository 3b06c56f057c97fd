"""TensorBoard's event files, read back by a second reading of the format."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.core.settings import Settings
from luthier.trackers import discover
from luthier.trackers._event_file import crc32c
from luthier.trackers.base import TrackedRun
from tests.event_files import read_events

_RUN = TrackedRun("ftjob-1", "proj_1", "tiny")


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    return Settings(_env_file=None, tensorboard_dir=str(tmp_path))


def test_the_checksum_is_the_published_one() -> None:
    # RFC 3720, appendix B.4, and the usual check value.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


def test_a_run_is_a_folder_of_files_that_hold_every_number(settings: Settings, tmp_path: Path) -> None:
    tracker = discover()["tensorboard"]
    config = tracker.Config.model_validate({"project": "mine", "name": "first"})
    for first in (1, 300):
        opened = tracker.open(config, _RUN, settings)
        opened.log(first, {"train_loss": 0.5, "learning_rate": 1e-4})
        opened.log(first + 1, {"train_loss": 0.25})
        opened.close("succeeded")
    folder = tmp_path / "proj_1" / "mine" / "first-ftjob-1"
    files = sorted(folder.iterdir())
    assert len(files) == 2
    assert all("tfevents" in file.name for file in files)
    events = read_events(files[1])
    assert [event.kind for event in events] == ["version", "start", "scalars", "scalars"]
    assert [event.step for event in events] == [0, 300, 300, 301]
    assert events[2].values == {
        "train_loss": 0.5,
        "learning_rate": struct.unpack("<f", struct.pack("<f", 1e-4))[0],
    }


def test_names_can_not_lead_out_of_the_folder() -> None:
    config = discover()["tensorboard"].Config
    for name in ("..", "../x", "a/b", "/etc", ".hidden", "a\n", "", "a" * 65, "ü"):
        with pytest.raises(ValueError, match="project"):
            config.model_validate({"project": name})
    with pytest.raises(ValueError, match="name"):
        config.model_validate({"project": "fine", "name": "../x"})
