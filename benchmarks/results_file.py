"""benchmarks/results/*.json: all that is measured, written after every run: a stop loses nothing."""

import fnmatch
import hashlib
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What a measurement of training depends on beside its rows: other code means another measurement.
_TRAINING = ("luthier/methods", "luthier/modeling", "luthier/training", "luthier_cpu", "benchmarks/peers")
# Of these, what measures a device and what serves alone, no training run loads: they decide no measurement of
# it. A test holds it.
_NOT_TRAINING = (
    "luthier_cpu/decode/adapter.py",
    "luthier_cpu/decode/batch.py",
    "luthier_cpu/decode/decode_graph.py",
    "luthier_cpu/decode/linear.py",
    "luthier_cpu/decode/llama.py",
    "luthier_cpu/decode/ops.py",
    "luthier_cpu/decode/runner.py",
    "benchmarks/peers/*serv*",
)
# What a job takes from its upload to the first token of its model hangs on all of it.
_JOB = ("luthier", "api", "db", "services", "worker", "benchmarks/peers")


# Raised when what is stored changes its shape.
_FORMAT = 2


class ResultsFile:
    """A JSON file of rows, each with the fingerprint of what it measured.

    Args:
        path: the file; read if it is there.
        machine: what describe_machine returned.
        fresh: forget what was measured before.

    Raises:
        SystemExit: when the file holds what another machine measured, which is not lost for this one's.
    """

    def __init__(self, path: Path, machine: dict[str, Any], *, fresh: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {"format": _FORMAT, "machine": machine, "rows": {}}
        if not fresh and path.exists():
            found = json.loads(path.read_text())
            if found.get("format") != _FORMAT:
                return
            if found["machine"] != machine:
                raise SystemExit(
                    f"{path} is of another machine ({found['machine']['processor']}; this one is "
                    f"{machine['processor']}). Move it and its table, or begin it again with --fresh."
                )
            self.content = found

    def row(self, name: str, fingerprint: str, code: str | None = None) -> dict[str, Any]:
        """Return what is stored of a row, to be filled; empty when it was measured on something else.

        Args:
            name: the row's.
            fingerprint: names rows, settings and code.
            code: names the code alone; training's when left out.

        Returns:
            A dictionary in the file's content.
        """
        rows: dict[str, dict[str, Any]] = self.content["rows"]
        if rows.get(name, {}).get("fingerprint") != fingerprint:
            rows[name] = {"fingerprint": fingerprint, "code": code or code_digest()}
        return rows[name]

    def save(self) -> None:
        """Write the file whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)


def code_digest(folders: tuple[str, ...] = _TRAINING, left_out: tuple[str, ...] = _NOT_TRAINING) -> str:
    """Name the code that decides a measurement, training's unless other folders are named.

    Args:
        folders: below the repository's root.
        left_out: patterns of the paths of files that decide nothing.
    """
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not any(fnmatch.fnmatch(name, pattern) for pattern in left_out):
                found.update(name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def job_digest() -> str:
    """Name the code that decides how long a job takes, from its upload to an answer."""
    return code_digest(_JOB, left_out=())


def fingerprint_of(*parts: Any) -> str:
    """Name settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
