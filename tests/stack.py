"""A supervised stack as a process of its own, for tests that signal and kill its parts."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai

from luthier.bases.catalogue import load_catalogue
from luthier.bases.fetch import ensure_base
from tests.folders import TEMPORARY_FOLDER
from tests.tiny import BASE_ID, CONTEXT_LENGTH, build_tiny_base
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
WAIT_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Return the pids of every process below one, the nearest first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(folder.name))
    found: list[int] = []
    generation = [pid]
    while generation:
        generation = [child for parent in generation for child in children.get(parent, [])]
        found += generation
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Stack:
    """One `luthier up`, or a stand-in for it: its process, output and home.

    Its folder has a short path that every user may enter; `command` is given home and port. The code is that
    of `root`.
    """

    def __init__(self, folder: Path, command: Callable[[Path, int], list[str]], root: Path = ROOT) -> None:
        self.root = root
        self.home = folder / "home"
        self.port = free_port()
        self.command = command(self.home, self.port)
        self.environment = {
            **os.environ,
            "STATE_DIRECTORY": str(folder / "state"),
            "PYTHONUNBUFFERED": "1",
            # A tiny base would be timed at every start, for nothing.
            "LUTHIER_INFERENCE_DTYPE": "float32",
        }
        self.output_path = folder / "output"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> "Stack":
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.root,
                env={**self.environment, **environment},
                stdout=output,
                stderr=output,
            )
        return self

    def until_ready(self) -> "Stack":
        self.until_output("Ready: ")
        return self

    def until_output(self, text: str) -> None:
        wait_until(lambda: text in self.output() or self.running.poll() is not None, text)
        assert text in self.output(), self.output()

    @property
    def running(self) -> "subprocess.Popen[bytes]":
        assert self.process is not None
        return self.process

    def output(self) -> str:
        return self.output_path.read_text()

    def log(self, name: str) -> str:
        return (self.home / "logs" / f"{name}.log").read_text()

    def connection(self) -> dict[str, str]:
        """Return the base URL and the API key, by the names that the SDK has for them."""
        return json.loads((self.home / "connection.json").read_text())

    def client(self, **options: Any) -> openai.OpenAI:
        """Return the SDK, which repeats nothing unless it is asked to."""
        return openai.OpenAI(**self.connection(), **{"max_retries": 0, "timeout": 120} | options)

    def pid_of(self, part: str) -> int:
        for pid in descendants(self.running.pid):
            if part.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError(f"no process {part}")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=30)


def up_command(home: Path, port: int) -> list[str]:
    """Return the command of the whole real service."""
    return [sys.executable, "-m", "luthier.cli.main", "up", "--home", str(home), "--port", str(port)]


@contextlib.contextmanager
def real_stack(**environment: str) -> Iterator[Stack]:
    """Hold the whole real service over the bases that are fetched, ready."""
    with stack_folder() as folder:
        made = Stack(folder, up_command)
        made.environment |= environment
        try:
            yield made.start().until_ready()
        finally:
            made.stop()


@contextlib.contextmanager
def tiny_stack(root: Path = ROOT, **environment: str) -> Iterator[Stack]:
    """Hold the whole real service over the tiny base, ready."""
    with stack_folder() as folder:
        source = build_tiny_base(folder / "source")
        models_file = folder / "models.toml"
        models_file.write_text(
            f'[bases.{BASE_ID}]\nsource = "path:{source}"\nlicence = "Apache-2.0"\n'
            f"context_length = {CONTEXT_LENGTH}\nmemory_gib = 0.1\n"
        )
        ensure_base(load_catalogue(models_file).bases[BASE_ID], folder / "bases", log=print)
        made = Stack(folder, up_command, root)
        made.environment |= {
            "LUTHIER_BASES_DIR": str(folder / "bases"),
            "LUTHIER_MODELS_FILE": str(models_file),
            "LUTHIER_PRELOAD_BASE": BASE_ID,
            "LUTHIER_NUM_THREADS": "1",
            **environment,
        }
        try:
            yield made.start().until_ready()
        finally:
            made.stop()


@contextlib.contextmanager
def stack_folder() -> Iterator[Path]:
    """Hold a folder for a stack. It is not pytest's own: the database's user must pass through it."""
    folder = Path(tempfile.mkdtemp(prefix="stack-", dir=TEMPORARY_FOLDER))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
