"""The demo's home: thrown away only when the demo made it and no service runs on it."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from examples.local_service import ServiceFailedError, make_fresh_home


@pytest.fixture(autouse=True)
def state_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    return tmp_path / "state"


def test_an_earlier_demo_s_home_is_emptied_and_its_database_removed(tmp_path, state_root):
    home = tmp_path / "demo"
    make_fresh_home(home)
    (home / "secrets.json").write_text(json.dumps({"home_id": "abc"}))
    (state_root / "abc").mkdir(parents=True)
    (state_root / "other").mkdir()
    make_fresh_home(home)
    assert not (home / "secrets.json").exists()
    assert [path.name for path in state_root.iterdir()] == ["other"]


def test_a_home_that_the_demo_did_not_make_is_left_alone(tmp_path):
    precious = tmp_path / "home" / "objects"
    precious.mkdir(parents=True)
    with pytest.raises(ServiceFailedError, match="left alone"):
        make_fresh_home(tmp_path / "home")
    assert precious.exists()


def test_a_home_that_a_service_runs_on_is_left_alone(tmp_path):
    home = tmp_path / "demo"
    make_fresh_home(home)
    descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ServiceFailedError, match="runs on"):
            make_fresh_home(home)
    finally:
        os.close(descriptor)
    assert home.exists()
