"""Health checks of the containers; exit code 0 means healthy. Reads, never writes.

python deploy/health.py URL [MEMBER]   the URL answers 200, and MEMBER of its JSON is true
python deploy/health.py worker         this host's worker told the database lately that it lives
"""

import json
import socket
import sys
import urllib.request
from datetime import timedelta
from urllib.error import URLError

_TIMEOUT_SECONDS = 4.0
# A worker that sweeps is alive; one that has missed this many sweeps is not.
_NUM_SWEEPS = 6


def check_url(url: str, member: str | None) -> str | None:
    """Return what is wrong with a URL's answer, or None."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            body = json.load(answer)
    except (URLError, OSError, ValueError) as error:
        return f"{url}: {error}"
    if member is not None and body.get(member) is not True:
        return f"{url}: {member} is {body.get(member)}"
    return None


def check_worker() -> str | None:
    """Return what is wrong with this host's worker, or None."""
    from sqlalchemy import func, select

    from db.session import Database
    from db.tables import Worker
    from luthier.core.errors import LuthierError
    from luthier.core.settings import Settings

    settings = Settings()
    limit = timedelta(seconds=settings.sweep_seconds * _NUM_SWEEPS)
    database = Database(settings.database_url.get_secret_value(), pool_size=1)
    lately = (Worker.hostname == socket.gethostname()) & (Worker.heartbeat_at > func.now() - limit)
    try:
        with database.transaction() as session:
            is_alive = session.scalar(select(Worker.id).where(lately).limit(1)) is not None
    except LuthierError as error:
        return error.message
    return None if is_alive else f"no sign of life in {limit.total_seconds():g} s"


def main(arguments: list[str]) -> str | None:
    """Run the check that the arguments name."""
    if arguments == ["worker"]:
        return check_worker()
    return check_url(arguments[0], arguments[1] if len(arguments) > 1 else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
