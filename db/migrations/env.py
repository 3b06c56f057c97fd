"""Alembic's entry: runs migrations on the connection it is given, or on LUTHIER_DATABASE_URL."""

from alembic import context
from sqlalchemy import Connection, create_engine

from db.tables import Table
from luthier.core.settings import Settings


def _run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Table.metadata, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    url = Settings().database_url.get_secret_value()
    with create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1)).connect() as opened:
        _run(opened)
        opened.commit()
