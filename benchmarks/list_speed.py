"""How the list of jobs grows: the first page beside the deepest one, of a project with a million jobs.

`python -m benchmarks.list_speed --jobs 1000000` starts a PostgreSQL of its own in a temporary folder, fills
it, and reads pages of twenty by the service's own function and over HTTP, first and deepest in turn. The bar:
the deepest page's 99th percentile is at most 1.3 times the first's. Exit code 1 when a list is over it.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import uvicorn
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from api.main import create_app, make_app_state
from benchmarks.throw_away import throw_away_postgres
from db.session import Database
from db.tables import ApiKey, Organization
from luthier.core.ids import new_api_key, new_id
from luthier.core.settings import Settings
from luthier.core.specs import TrainingSpec
from luthier.methods._tuning import check_tuning
from services.accounts.auth import Principal
from services.bootstrap import ensure_first_rows
from services.files import files
from services.files.files import StoredFile
from services.jobs import jobs

# One job a second into the past, a tenth of them without metadata. The keys of the filters: `team` has ten
# values, `run` a thousand.
_INSERT = """
INSERT INTO jobs (
  id, organization_id, project_id, created_by_key_id, created_at, status, model, base_id, spec,
  training_file_id, seed, metadata, started_at, finished_at, tidied_at, fine_tuned_model, trained_tokens,
  lease_epoch, last_event_seq
)
SELECT
  'ftjob-' || md5(number::text), :organization, :project, :key, now() - number * interval '1 second',
  (ARRAY['succeeded', 'failed', 'cancelled'])[1 + number % 3], 'base', 'base', CAST(:spec AS jsonb),
  :file, number,
  CASE WHEN number % 10 = 0 THEN NULL ELSE jsonb_build_object(
    'team', 't' || (number % 10), 'run', (number / 10 % 1000)::text, 'note', md5('note' || number)
  ) END,
  now(), now(), now(), 'ft:base:personal::' || substr(md5(number::text), 1, 8), 1000, 2, 20
FROM generate_series(1, :num_jobs) AS number
"""


def fill(database: Database, num_jobs: int) -> Principal:
    """Make the jobs of the first key's project.

    Args:
        database: migrated and bootstrapped.
        num_jobs: how many.

    Returns:
        The scope of that key.
    """
    spec = TrainingSpec(base_id="base", tuning=check_tuning({"type": "lora"}), seed=1)
    with database.transaction() as session:
        key = session.scalars(select(ApiKey)).one()
        slug = session.scalars(select(Organization.slug)).one()
        scope = Principal(key.organization_id, slug, key.project_id, key.id, is_admin=True)
        stored = StoredFile(new_id("file"), "rows.jsonl", "fine-tune", 1, 10, "0" * 64, "nowhere")
        file = files.record(session, scope, stored)
        session.execute(
            text(_INSERT),
            {
                "organization": scope.organization_id,
                "project": scope.project_id,
                "key": scope.key_id,
                "spec": spec.model_dump_json(),
                "file": file.id,
                "num_jobs": num_jobs,
            },
        )
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE jobs"))
    return scope


MAX_RATIO = 1.3
_LIMIT = 20
# One job in 1,000 is in the rarest list.
_MIN_JOBS = 1000 * 2 * _LIMIT
# A million rows are written first; nothing of it is to last.
_UNSAFE_AND_FAST = ("fsync=off", "synchronous_commit=off", "wal_level=minimal", "max_wal_senders=0")


@dataclass(frozen=True)
class Filter:
    """One way to list, as the service takes it and as the query says it."""

    name: str
    metadata: dict[str, str] | None
    has_no_metadata: bool
    query: dict[str, str]
    condition: str


FILTERS = (
    Filter("all", None, False, {}, "true"),
    Filter(
        "metadata, 1 in 10",
        {"team": "t3"},
        False,
        {"metadata[team]": "t3"},
        """metadata @> '{"team": "t3"}'""",
    ),
    Filter(
        "metadata, 1 in 1000",
        {"run": "7"},
        False,
        {"metadata[run]": "7"},
        """metadata @> '{"run": "7"}'""",
    ),
    Filter("metadata=null", None, True, {"metadata": "null"}, "metadata IS NULL"),
)


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """Serve the API on a free port; yields its base URL."""
    server = uvicorn.Server(uvicorn.Config(create_app(make_app_state(settings)), port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(timeout=15)


def deepest_cursor(session: Session, condition: str) -> str:
    """Return the id after which the last page of a filter begins."""
    found = session.execute(
        text(f"SELECT id FROM jobs WHERE {condition} ORDER BY created_at, id OFFSET {_LIMIT} LIMIT 1")
    )
    return str(found.scalar_one())


def measure(
    first: Callable[[], int], deepest: Callable[[], int], num_rounds: int
) -> tuple[list[float], list[float]]:
    """Time two reads in turn; both must give a full page every time.

    Args:
        first: reads the first page and returns its number of jobs.
        deepest: reads the deepest one.
        num_rounds: how often each is read, after a tenth of that to warm up.

    Returns:
        Milliseconds of each read.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(num_rounds + num_rounds // 10):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for which in order:
            began = time.perf_counter()
            num_jobs = (first, deepest)[which]()
            took = 1000 * (time.perf_counter() - began)
            assert num_jobs == _LIMIT, num_jobs
            if number >= num_rounds // 10:
                times[which].append(took)
    return times


def percentile(times: list[float], percent: int) -> float:
    """Return a percentile of some times."""
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def report(name: str, first: list[float], deepest: list[float]) -> float:
    """Print a line of the table and return the ratio of the 99th percentiles."""
    ratio = percentile(deepest, 99) / percentile(first, 99)
    cells = [f"{percentile(times, p):8.2f}" for times in (first, deepest) for p in (50, 99)]
    verdict = "met" if ratio <= MAX_RATIO else "missed"
    print(f"| {name:34} | {' | '.join(cells)} | {ratio:5.2f} {verdict} |", flush=True)
    return ratio


def run(num_jobs: int, num_rounds: int, folder: Path) -> bool:
    """Fill, measure, print; return whether every list is within the bar."""
    with throw_away_postgres(folder, _UNSAFE_AND_FAST) as url:
        settings = Settings(
            _env_file=None,
            database_url=url,
            storage_url=f"file://{folder}/objects",
            bases_dir=folder / "bases",
            bootstrap_api_key=new_api_key(),
        )
        database = Database(url, pool_size=2)
        with database.transaction() as session:
            ensure_first_rows(session, settings)
        began = time.monotonic()
        scope = fill(database, num_jobs)
        print(
            f"{num_jobs} jobs in {time.monotonic() - began:.0f} s; pages of {_LIMIT}, {num_rounds} reads each"
        )
        print(f"| {'list':34} | first p50 | p99, ms  | deep p50 | p99, ms  | p99 ratio  |")
        with served(settings) as base_url:
            key = settings.bootstrap_api_key.get_secret_value()
            ratios = [
                ratio
                for chosen in FILTERS
                for ratio in _measure_filter(database, scope, chosen, num_rounds, base_url, key)
            ]
        database.close()
    return max(ratios) <= MAX_RATIO


def _measure_filter(
    database: Database, scope: Principal, chosen: Filter, num_rounds: int, base_url: str, key: str
) -> list[float]:
    with database.transaction() as session:
        cursor = deepest_cursor(session, chosen.condition)

    def by_service(after: str | None) -> int:
        with database.transaction() as session:
            rows, _ = jobs.list_(
                session,
                scope,
                after=after,
                limit=_LIMIT,
                metadata=chosen.metadata,
                has_no_metadata=chosen.has_no_metadata,
            )
            return len(rows)

    with httpx2.Client(base_url=base_url, headers={"Authorization": f"Bearer {key}"}) as http:

        def by_http(after: str | None) -> int:
            query = chosen.query | {"limit": str(_LIMIT)} | ({} if after is None else {"after": after})
            return len(http.get("/fine_tuning/jobs", params=query).json()["data"])

        return [
            report(
                f"{chosen.name}, {how}",
                *measure(lambda read=read: read(None), lambda read=read: read(cursor), num_rounds),  # type: ignore[misc]
            )
            for how, read in (("service", by_service), ("HTTP", by_http))
        ]


def main() -> None:
    """Measure; exit code 1 when a list is over the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1000, help="reads of each page")
    arguments = parser.parse_args()
    if arguments.jobs < _MIN_JOBS:
        parser.error(f"--jobs must be at least {_MIN_JOBS}: the rarest filter needs two pages")
    # Short, and open to the user who runs the database when we are root.
    folder = Path(tempfile.mkdtemp(prefix="lists-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        is_within = run(arguments.jobs, arguments.rounds, folder)
    finally:
        shutil.rmtree(folder)
    sys.exit(0 if is_within else 1)


if __name__ == "__main__":
    main()
