"""`python -m tests.integration.stand_in_stack HOME PORT`: `luthier up` with light stand-ins for the service.

Database and broker are the real embedded ones. The worker's stand-in has a child in its group and, when
STUBBORN is set, ignores TERM; the migration's fails when BROKEN is set.
"""

import os
import sys
from functools import partial
from pathlib import Path

from luthier.cli.settings import read_settings
from luthier.cli.stack.plan import Plan, answers
from luthier.cli.stack.processes import ProcessSpec
from luthier.cli.stack.up import up
from luthier.core.errors import LuthierError

_MIGRATE = """
import os, psycopg
url = os.environ["LUTHIER_DATABASE_URL"].replace("+psycopg", "")
with psycopg.connect(url) as connection:
    connection.execute("CREATE TABLE IF NOT EXISTS starts (at timestamptz DEFAULT now())")
    connection.execute("INSERT INTO starts DEFAULT VALUES")
    count, = connection.execute("SELECT count(*) FROM starts").fetchone()
    asked = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
    is_superuser, = connection.execute(asked).fetchone()
print(f"start {count} superuser {is_superuser}", flush=True)
open(os.path.join(os.environ["LUTHIER_HOME"], "web", "of-a-process"), "w").close()
if "BROKEN" in os.environ:
    raise SystemExit("no such table: cheese")
"""
_WORKER = """
import os, signal, subprocess, time
if "STUBBORN" in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "1000"])
time.sleep(1000)
"""


def _plan(environment: dict[str, str], *, host: str, port: int) -> Plan:
    folder = Path(environment["LUTHIER_HOME"]) / "web"
    folder.mkdir(exist_ok=True)
    python = sys.executable
    return Plan(
        early=(),
        steps=(ProcessSpec("migrate", (python, "-c", _MIGRATE), environment),),
        late=(
            ProcessSpec(
                name="api",
                command=(python, "-m", "http.server", str(port), "--bind", host),
                environment=environment,
                is_ready=partial(answers, f"http://{host}:{port}", "/"),
                folder=folder,
            ),
            ProcessSpec(name="worker", command=(python, "-c", _WORKER), environment=environment),
        ),
    )


def main() -> None:
    """Run until a signal."""
    os.environ["LUTHIER_PRELOAD_BASE"] = ""
    home, port = Path(sys.argv[1]), int(sys.argv[2])
    try:
        up(home, host="127.0.0.1", port=port, settings=read_settings(), make_plan=_plan)
    except LuthierError as error:
        sys.exit(f"luthier: {error.message}")


if __name__ == "__main__":
    main()
