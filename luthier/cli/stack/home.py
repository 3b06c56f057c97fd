"""The home folder of one embedded service: its lock, secrets, logs, short run folder, connection file.

Nothing here starts a process, and no folder that is not ours has its mode changed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dotenv import dotenv_values

from luthier.core.errors import LuthierError
from luthier.core.ids import new_api_key
from luthier.storage.manifests import write_file_atomically
from luthier.webhooks.sealing import new_secret_key

CONNECTION_NAME = "connection.json"
# A link in the home to the run folder, by which other commands find the sockets.
RUN_LINK_NAME = "run"
_RUN_PREFIX = "luthier-"
_HOME_MARKER = "home"
# A socket's path has 107 bytes at most; the longest name below a run folder is pg/.s.PGSQL.5432.
MAX_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET_NAME = "pg/.s.PGSQL.5432.lock"


class StackError(LuthierError):
    """The embedded service can't start or continue; the message says what to do."""

    code = "stack_error"


def resolve_home(home: Path | None) -> Path:
    """Return the absolute home: the one given, else LUTHIER_HOME (environment or .env), else ./.luthier."""
    if home is None:
        home = Path(os.environ.get("LUTHIER_HOME") or dotenv_values(".env").get("LUTHIER_HOME") or ".luthier")
    return home.expanduser().absolute()


@dataclass(frozen=True)
class Secrets:
    """The secrets of a home, generated once.

    `home_id` names the database's folder where that can't be inside the home. `api_key` is the first admin
    key; the passwords are those of PostgreSQL's owner and of the service's role; `secret_key` seals secrets
    in the database.
    """

    home_id: str
    api_key: str = field(repr=False)
    postgres_password: str = field(repr=False)
    database_password: str = field(repr=False)
    secret_key: str = field(repr=False)


def load_secrets(home: Path, *, only_reads: bool = False) -> Secrets:
    """Read HOME/secrets.json (mode 0600), generated at the first call; the home's lock is held.

    With `only_reads` nothing is written: a sealing key that does not exist yet is then empty.

    Raises:
        StackError: when the file can't be read, or is missing with `only_reads`.
    """
    path = home / "secrets.json"
    if not only_reads and not path.exists():
        made = Secrets(
            home_id=secrets.token_hex(8),
            api_key=new_api_key(),
            postgres_password=secrets.token_hex(24),
            database_password=secrets.token_hex(24),
            secret_key=new_secret_key(),
        )
        _write_secrets(path, asdict(made))
    try:
        found = json.loads(path.read_bytes())
        if "secret_key" not in found:
            # A home of an older version.
            found["secret_key"] = "" if only_reads else new_secret_key()
            if not only_reads:
                _write_secrets(path, found)
        return Secrets(**found)
    except (OSError, ValueError, TypeError) as error:
        raise StackError(
            f"{path} can't be read ({type(error).__name__}). Restore it from a backup, or move {home} away "
            "to begin with an empty service."
        ) from error


def _write_secrets(path: Path, content: dict[str, str]) -> None:
    write_file_atomically(path, json.dumps(content, indent=1).encode(), mode=0o600)


@contextlib.contextmanager
def locked_home(home: Path) -> Iterator[None]:
    """Create the home (mode 0700) and hold its lock, which the kernel releases when this process ends.

    Raises:
        StackError: when another process holds the lock, or the folder can't be created.
    """
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StackError(
            f"The home {home} can't be used: {error.strerror}. Name another by --home."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
            raise StackError(
                f"A service runs on {home} already (process {holder}). Stop it first, or name another "
                "folder by --home and another port by --port."
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_open_to_others(home: Path) -> bool:
    """Whether other users can enter a home, and read files and models there."""
    return bool(home.stat().st_mode & 0o077)


def find_lock_holder(home: Path) -> int | None:
    """Return the pid of the `luthier up` that runs on a home, or None when none does."""
    try:
        descriptor = os.open(home / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # A shared lock is refused only while the exclusive one is held.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).decode().strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(descriptor)
    return None


def _run_folder_parents() -> list[Path]:
    # As root the folder must be enterable by the database's user, which /run/user/0 is not.
    runtime = os.environ.get("XDG_RUNTIME_DIR") if os.geteuid() != 0 else None
    candidates = [Path(runtime)] if runtime else []
    candidates += [Path(tempfile.gettempdir()), Path("/tmp")]
    return [path for path in dict.fromkeys(candidates) if path.is_dir() and os.access(path, os.W_OK)]


def _home_mark(home: Path) -> bytes:
    return hashlib.sha256(os.fsencode(home)).hexdigest().encode()


def _remove_stale_run_folders(home: Path, parents: list[Path]) -> None:
    """Remove the folders of killed runs: the caller holds the lock, so any folder of this home is stale."""
    for parent in parents:
        for folder in parent.glob(_RUN_PREFIX + "*"):
            marker = folder / _HOME_MARKER
            with contextlib.suppress(OSError):
                is_ours = folder.lstat().st_uid == os.geteuid() and not folder.is_symlink()
                if is_ours and marker.read_bytes() == _home_mark(home):
                    shutil.rmtree(folder)


@contextlib.contextmanager
def run_folder(home: Path) -> Iterator[Path]:
    """Yield a new folder for sockets, removed at the end; a link in the locked home leads to it.

    Raises:
        StackError: when no writable folder has a short enough path.
    """
    parents = _run_folder_parents()
    _remove_stale_run_folders(home, parents)
    for parent in parents:
        path = f"{parent}/{_RUN_PREFIX}12345678/{_LONGEST_SOCKET_NAME}"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
            break
    else:
        raise StackError("No short writable folder for sockets: set TMPDIR to one, such as /tmp.")
    folder = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX, dir=parent))
    # A lock on the folder keeps systemd's cleaning of temporary folders away from it (tmpfiles.d(5)).
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.geteuid() == 0:
            folder.chmod(0o711)  # the database's user passes through it to a folder of its own
        (folder / _HOME_MARKER).write_bytes(_home_mark(home))
        link = home / RUN_LINK_NAME
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        yield folder
    finally:
        os.close(descriptor)
        (home / RUN_LINK_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def write_connection(home: Path, *, base_url: str, api_key: str) -> None:
    """Write HOME/connection.json (mode 0600), by which clients on this machine find the service."""
    content = json.dumps({"base_url": base_url, "api_key": api_key}, indent=1) + "\n"
    write_file_atomically(home / CONNECTION_NAME, content.encode(), mode=0o600)
