"""Sessions whose statements are transactions of their own."""

import pytest
from sqlalchemy import select, text

from db.session import Database
from luthier.core.errors import UnavailableError
from tests.conftest import Server, fresh_database


def test_each_statement_is_kept_whatever_comes_after_and_sees_what_others_kept(postgres: Server) -> None:
    with fresh_database(postgres) as database:
        with database.transaction() as session:
            session.execute(text("CREATE TABLE told AS SELECT 'nothing' AS what"))
        told = text("SELECT what FROM told")
        with pytest.raises(ValueError, match="after"), database.statements() as session:
            session.execute(text("UPDATE told SET what = 'first'"))
            with database.transaction() as other:
                assert other.scalar(told) == "first"
                other.execute(text("UPDATE told SET what = 'second'"))
            assert session.scalar(told) == "second"
            raise ValueError("after")
        # The same connection commits at the end again.
        with pytest.raises(ValueError, match="undone"), database.transaction() as session:
            session.execute(text("UPDATE told SET what = 'third'"))
            raise ValueError("undone")
        with database.transaction() as session:
            assert session.scalar(told) == "second"


def test_a_database_that_is_not_there_is_told_as_such() -> None:
    database = Database("postgresql://nobody@127.0.0.1:9/none", pool_size=1)
    with pytest.raises(UnavailableError), database.statements() as session:
        session.execute(select(1))
    database.close()
