"""TensorBoard's files: one an attempt, each of which says from which step on it counts."""

import struct

import pytest

from luthier.core.settings import Settings
from luthier.trackers import discover
from luthier.trackers.base import TrackedRun
from tests.event_files import read_events, scalars

_RUN = TrackedRun("ftjob-1", "proj_1", "tiny")


def test_a_run_is_a_folder_of_files_that_hold_every_number(tmp_path):
    settings = Settings(_env_file=None, tensorboard_dir=str(tmp_path))
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
    version, start, *steps = read_events(files[1])
    assert version.file_version == "brain.Event:2"
    # What earlier files have from this step on is void.
    assert (start.step, start.session_log.status) == (300, start.session_log.START)
    learning_rate = struct.unpack("<f", struct.pack("<f", 1e-4))[0]
    assert [(event.step, scalars(event)) for event in steps] == [
        (300, {"train_loss": 0.5, "learning_rate": learning_rate}),
        (301, {"train_loss": 0.25}),
    ]


def test_names_can_not_lead_out_of_the_folder():
    config = discover()["tensorboard"].Config
    for name in ("..", "../x", "a/b", "/etc", ".hidden", "a\n", "", "a" * 65, "ü"):
        with pytest.raises(ValueError, match="project"):
            config.model_validate({"project": name})
    with pytest.raises(ValueError, match="name"):
        config.model_validate({"project": "fine", "name": "../x"})
