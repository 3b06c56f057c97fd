"""Our side: the real inference server's process on its Unix socket, and the client that asks it."""

import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve.artifacts import Published
from benchmarks.serve.process import Process, SideFailedError, free_port
from benchmarks.serve.prompts import Prompt
from benchmarks.train.contestants import quiet_environment
from luthier.core.inference import HEADER_TOKEN, ModelTarget

_START_SECONDS = 180.0
_POLL_SECONDS = 0.05
PROJECT = "proj_bench"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Place:
    """Where a measurement's files are and how it runs, the same for every server that it starts."""

    bases_dir: Path
    base_id: str
    objects: Path
    num_threads: int
    dtype: str
    run_dir: Path


class Client:
    """The process that sends requests, to our server or to a peer's."""

    def __init__(self, log: Path) -> None:
        self._process = Process([sys.executable, "-m", "benchmarks.serve.client"], quiet_environment(1), log)

    def send(
        self, url: str, requests: Sequence[Mapping[str, Any]], *, concurrency: int | None = None
    ) -> dict[str, Any]:
        """Send requests, each at its moment, and wait for all of their answers.

        Args:
            url: `unix:///path.sock` or `http://host:port`.
            requests: path, headers, body, at_seconds.
            concurrency: how many may be under way at a time; all of them when None.

        Returns:
            `answers` in the order of the requests, and `seconds` from the begin to the last one's end.
        """
        return self._process.ask({"url": url, "requests": list(requests), "concurrency": concurrency})

    def close(self) -> None:
        """End it."""
        self._process.close()


class OurServer:
    """The inference server.

    Args:
        place: base, artifacts, threads.
        client: who asks.
        name: of its folder.
        settings: of its own, by their environment variables.
        is_tcp: whether it listens on TCP, instead of a Unix socket.
    """

    def __init__(
        self,
        place: Place,
        client: Client,
        name: str = "ours",
        settings: Mapping[str, str] | None = None,
        *,
        is_tcp: bool = False,
    ) -> None:
        folder = place.run_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        self.place = place
        # Short: a socket's path has 107 bytes at most.
        self.url = f"http://127.0.0.1:{free_port()}" if is_tcp else f"unix://{place.run_dir}/{name}.sock"
        # What requests over TCP are let in by.
        self.token = secrets.token_hex(16) if is_tcp else ""
        self._client = client
        environment = quiet_environment(place.num_threads) | {
            "LUTHIER_INFERENCE_URL": self.url,
            "LUTHIER_INTERNAL_TOKEN": self.token,
            "LUTHIER_INFERENCE_DTYPE": place.dtype,
            "LUTHIER_NUM_THREADS": str(place.num_threads),
            "LUTHIER_BASES_DIR": str(place.bases_dir),
            "LUTHIER_PRELOAD_BASE": place.base_id,
            "LUTHIER_STORAGE_URL": f"file://{place.objects}",
            "LUTHIER_CACHE_DIR": str(folder / "cache"),
            "LUTHIER_HOME": str(folder),
            "LUTHIER_DEVICE": "cpu",
            **(settings or {}),
        }
        self.process = Process(
            [sys.executable, "-m", "luthier.inference.server"], environment, folder / "log"
        )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        """Ask for one token until it comes: then the base is loaded."""
        deadline = time.monotonic() + _START_SECONDS
        one = self.request(None, Prompt([1, 2, 3], ""), num_new=1)
        while time.monotonic() < deadline:
            self.process.check()
            if self.send([one])["answers"][0]["error"] is None:
                return
            time.sleep(_POLL_SECONDS)
        raise SideFailedError(f"our server was not ready within {_START_SECONDS:.0f} s")

    def request(
        self, model: Published | None, prompt: Prompt, *, num_new: int, at_seconds: float = 0.0
    ) -> dict[str, Any]:
        """Return one request for a number of tokens, the most probable ones.

        Args:
            model: the tuned model; the base when None.
            prompt: what it continues.
            num_new: tokens to be made.
            at_seconds: when it is sent.
        """
        name = self.place.base_id if model is None else model.name
        target = ModelTarget(
            model=name,
            base_id=self.place.base_id,
            project_id=PROJECT,
            artifact=None if model is None else model.prefix,
            digest=None if model is None else model.digest,
        )
        return {
            "path": COMPLETIONS,
            "headers": target.to_headers() | ({HEADER_TOKEN: self.token} if self.token else {}),
            "body": completion_body(name, prompt.token_ids, num_new=num_new),
            "at_seconds": at_seconds,
        }

    def send(
        self, requests: Sequence[Mapping[str, Any]], *, concurrency: int | None = None
    ) -> dict[str, Any]:
        """Send requests as Client.send does."""
        return self._client.send(self.url, requests, concurrency=concurrency)

    def first_token_seconds(self, model: Published | None, prompt: Prompt, *, num_new: int = 1) -> float:
        """Return the time to first token of a request that is alone.

        Args:
            model: the tuned model; the base when None.
            prompt: what it continues.
            num_new: tokens to be made.

        Returns:
            Seconds from the request to the first text.

        Raises:
            SideFailedError: when it is not answered.
        """
        answer = self.send([self.request(model, prompt, num_new=num_new)])["answers"][0]
        return first_token_of(answer)

    def close(self) -> None:
        """End it."""
        self.process.close()


def first_token_of(answer: Mapping[str, Any]) -> float:
    """Return an answer's time to first token in seconds; a token without text counts when it ends.

    Args:
        answer: what the client reported.

    Returns:
        Seconds since it was sent.

    Raises:
        SideFailedError: when the request failed.
    """
    if answer["error"] is not None:
        raise SideFailedError(f"a request failed: {answer['error']}")
    first = answer["end"] if answer["first"] is None else answer["first"]
    return float(first - answer["sent"])


def completion_body(model: str, prompt: list[int] | str, *, num_new: int) -> dict[str, Any]:
    """Return the body of a streaming request for the most probable tokens."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_new,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextmanager
def our_server(
    place: Place,
    client: Client,
    name: str = "ours",
    settings: Mapping[str, str] | None = None,
    *,
    is_tcp: bool = False,
) -> Iterator[OurServer]:
    """Run a server for the length of a block, with nothing loaded but the base.

    Args:
        place: base, artifacts, threads.
        client: who asks.
        name: of its folder.
        settings: as OurServer takes them.
        is_tcp: so too.

    Yields:
        The server, ready.
    """
    server = OurServer(place, client, f"{name}-{os.urandom(3).hex()}", settings, is_tcp=is_tcp)
    try:
        yield server
    finally:
        server.close()
