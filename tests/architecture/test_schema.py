"""Tables, migrations and the table of states say the same."""

import ast
import re
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import inspect, text

from db.migrate import alembic_config
from db.session import Database
from luthier.core.states import TRANSITIONS
from tests.architecture.sources import ROOT


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


# The first makes the table.
@pytest.mark.parametrize(
    "path", sorted((ROOT / "db/migrations/versions").glob("0*.py"))[1:], ids=lambda path: path.stem
)
def test_a_migration_that_holds_back_leases_says_that_workers_must_be_stopped(path: Path) -> None:
    source = path.read_text()
    if re.search(r'create_index\(\s*"\w+",\s*"jobs"(?![^()]*postgresql_concurrently=True)', source):
        assert "Stop all workers first" in (ast.get_docstring(ast.parse(source)) or "")


def test_the_database_allows_the_changes_of_status_that_the_code_allows(database: Database) -> None:
    with database.engine.begin() as connection:
        definition = connection.scalar(text("SELECT pg_get_functiondef('check_job_status'::regproc)"))
    allowed = set(re.findall(r"\('(\w+)', '(\w+)'\)", str(definition)))
    assert allowed == {(source.value, to.value) for source, targets in TRANSITIONS.items() for to in targets}
