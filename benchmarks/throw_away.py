"""A PostgreSQL for the length of a measurement, the embedded one."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from db.migrate import upgrade
from db.session import Database
from luthier.cli.stack.home import load_secrets
from luthier.cli.stack.postgres import open_postgres
from luthier.cli.stack.processes import spawn

_START_SECONDS = 60.0


@contextmanager
def throw_away_postgres(folder: Path, settings: Sequence[str] = ()) -> Iterator[str]:
    """Run a PostgreSQL in a folder that its user may pass through.

    Args:
        folder: an existing folder, short enough for a socket in it.
        settings: what is other than `luthier up` has it, such as `fsync=off`.

    Yields:
        The URL of an empty, migrated database.
    """
    os.environ["STATE_DIRECTORY"] = str(folder / "state")
    secrets = load_secrets(folder)
    server = open_postgres(folder, folder, secrets, say=lambda _line: None)
    spec = server.spec()
    server.prepare()
    process = spawn(
        (*spec.command, *(part for setting in settings for part in ("-c", setting))),
        environment=spec.environment,
        log_path=folder / "postgres.log",
        user=spec.user,
        folder=spec.folder,
        death_signal=spec.death_signal,
    )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not spec.is_ready():
            if time.monotonic() > deadline:
                sys.exit((folder / "postgres.log").read_text())
            time.sleep(0.1)
        database = Database(server.url(), pool_size=1)
        upgrade(database)
        database.close()
        yield server.url()
    finally:
        process.send_signal(spec.stop_signal)
        process.wait(timeout=60)
