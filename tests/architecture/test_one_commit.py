"""One commit in the project, and no middleware that hides a client who leaves."""

import ast

from tests.architecture.sources import ROOMS, python_files, tree_of

# The transaction itself; migrations, which run in the engine's own.
_MAY_COMMIT = {"db/session.py", "db/migrate.py", "db/migrations/env.py"}
# The LISTEN connection only reads; the embedded server's role and database are made outside transactions.
_MAY_AUTOCOMMIT = {"api/streaming/event_hub.py", "luthier/cli/stack/postgres.py"}


def _calls(name: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.Call)]


def _method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def test_only_the_transaction_commits() -> None:
    commits = {
        name
        for name in python_files(*ROOMS)
        if any(_method(call) in {"commit", "begin", "begin_nested"} for call in _calls(name))
    }
    assert commits == _MAY_COMMIT


def test_no_connection_commits_by_itself_where_the_service_writes() -> None:
    commits = {
        name
        for name in python_files(*ROOMS)
        if any(
            keyword.arg in {"autocommit", "isolation_level"}
            for call in _calls(name)
            for keyword in call.keywords
        )
    }
    assert commits == _MAY_AUTOCOMMIT


def test_there_is_no_middleware_that_hides_a_disconnect() -> None:
    for name in python_files("api", "luthier/inference"):
        for node in ast.walk(tree_of(name)):
            used = {
                getattr(node, "id", None),
                getattr(node, "attr", None),
                getattr(node, "name", None) if isinstance(node, ast.alias) else None,
            }
            assert "BaseHTTPMiddleware" not in used, name
        for call in _calls(name):
            words = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            assert not (_method(call) == "middleware" and "http" in words), name
