"""`python -m db.migrate`: bring the schema to the newest revision, one process at a time."""

from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from db.session import Database
from luthier.core.settings import Settings

_ADVISORY_LOCK = 0x1074137


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
    """Run what is missing, in one transaction; a second process waits, then finds nothing to do."""
    with database.engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
        command.upgrade(alembic_config(connection), "head")


def main() -> None:
    """Upgrade the database that the settings name."""
    database = Database(Settings().database_url.get_secret_value(), pool_size=1)
    upgrade(database)
    structlog.get_logger().info("database is at the newest revision", revision=newest_revision())


if __name__ == "__main__":
    main()
