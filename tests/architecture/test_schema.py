"""Tables, migrations and the table of states say the same."""

import re

from alembic import command
from sqlalchemy import inspect, text

from db.migrate import alembic_config
from db.session import Database
from luthier.core.states import TRANSITIONS


def test_the_migrations_make_the_tables_of_the_code(database: Database) -> None:
    with database.engine.begin() as connection:
        # Raises when a migration is missing.
        command.check(alembic_config(connection))


def test_the_migrations_run_down_and_up_again(database: Database) -> None:
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        left = connection.scalars(
            text("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
        ).all()
        assert list(left) == []
    with database.engine.begin() as connection:
        command.upgrade(alembic_config(connection), "head")
        command.check(alembic_config(connection))


def test_the_database_allows_the_changes_of_status_that_the_code_allows(database: Database) -> None:
    with database.engine.begin() as connection:
        definition = connection.scalar(text("SELECT pg_get_functiondef('check_job_status'::regproc)"))
    allowed = set(re.findall(r"\('(\w+)', '(\w+)'\)", str(definition)))
    assert allowed == {(source.value, to.value) for source, targets in TRANSITIONS.items() for to in targets}
