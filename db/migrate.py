"""`python -m db.migrate`: bring the schema to the newest revision, one process at a time."""

import time
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from db.session import Database
from luthier.core.settings import Settings

_ADVISORY_LOCK = 0x1074137
_LOCK_SECONDS = 5
_LOCK_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)


def alembic_config(connection: Connection | None = None) -> Config:
    """Return alembic's configuration; migrations run on `connection` when one is given."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def newest_revision() -> str | None:
    """Return the revision that this code expects the database to have."""
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


def upgrade(database: Database) -> None:
    """Run what is missing, in one transaction; a second process waits, then finds nothing to do.

    A locked table is waited for only shortly, since later statements queue behind it; then all is undone and
    tried again.
    """
    for pause_seconds in (*_LOCK_PAUSES_SECONDS, None):
        try:
            with database.engine.begin() as connection:
                # As long as it takes, the wait for another process too.
                connection.execute(text("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
                connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'"))
                command.upgrade(alembic_config(connection), "head")
            return
        except OperationalError as error:
            if pause_seconds is None or not isinstance(error.orig, LockNotAvailable):
                raise
            structlog.get_logger().warning("a table is in use, the migration is tried again")
            time.sleep(pause_seconds)


def main() -> None:
    """Upgrade the database that the settings name."""
    database = Database(Settings().database_url.get_secret_value(), pool_size=1, answer_seconds=None)
    upgrade(database)
    structlog.get_logger().info("database is at the newest revision", revision=newest_revision())


if __name__ == "__main__":
    main()
