"""What runs streams: our server, a peer's process, a peer's server. All answer the same question alike."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.serve.artifacts import Published
from benchmarks.serve.engine import COMPLETIONS, Client, OurServer, completion_body
from benchmarks.serve.figures import percentile
from benchmarks.serve.plan import NUM_CACHE_PAGES, Contest, Setting
from benchmarks.serve.process import Process, SideFailedError, free_port
from benchmarks.serve.prompts import Prompt
from benchmarks.train.contestants import SCRIPTS, ensure_environment, quiet_environment
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.methods.adapter import LOADER

_START_SECONDS = 180.0
# Of vLLM's and llama.cpp's caches, beyond what the streams take.
_SPARE_TOKENS = 64


@dataclass(frozen=True)
class Streams:
    """Streams that run together; `models` has one a prompt, None for the base."""

    prompts: list[Prompt]
    models: list[Published | None]
    num_new: int


class Contestant(Protocol):
    """One side of a row."""

    def run(self, streams: Streams) -> dict[str, Any]:
        """Run streams and return `seconds`, `num_tokens` of each and `answers`, the token ids of each."""

    def pause(self) -> None:
        """Stand still."""

    def resume(self) -> None:
        """Continue."""

    def close(self) -> None:
        """End."""


class Ours:
    """Our server over HTTP."""

    def __init__(self, server: OurServer, tokenizer: Tokenizer) -> None:
        self._server = server
        self._tokenizer = tokenizer

    def run(self, streams: Streams) -> dict[str, Any]:
        """Ask for all streams at once."""
        requests = [
            self._server.request(model, prompt, num_new=streams.num_new)
            for model, prompt in zip(streams.models, streams.prompts, strict=True)
        ]
        return read_answers(self._server.send(requests), self._tokenizer, streams.num_new)

    def pause(self) -> None:
        """Stand still."""
        self._server.process.pause()

    def resume(self) -> None:
        """Continue."""
        self._server.process.resume()

    def close(self) -> None:
        """End the server."""
        self._server.close()


class PeerProcess:
    """A peer that is called in a process of its own, without HTTP."""

    def __init__(
        self,
        contest: Contest,
        setting: Setting,
        *,
        base: Path,
        models: Sequence[Published],
        num_threads: int,
        num_streams: int,
        num_tokens: int,
        scratch: Path,
    ) -> None:
        own = Path(sys.executable)
        python = own if contest.environment is None else ensure_environment(contest.environment)
        loader = scratch / "bottleneck_loader.py"
        loader.write_text(LOADER)
        order = scratch / f"order-{contest.name}.json"
        order.write_text(
            json.dumps(
                {
                    "base": str(base),
                    "models": [
                        {"name": one.name, "kind": one.kind, "folder": str(one.folder)} for one in models
                    ],
                    "num_threads": num_threads,
                    "max_rows": num_streams,
                    "num_cache_pages": NUM_CACHE_PAGES,
                    "max_length": num_tokens + _SPARE_TOKENS,
                    "options": setting.options,
                    "scratch": str(scratch),
                    "loader": str(loader),
                }
            )
        )
        self._process = Process(
            [str(python), str(SCRIPTS / f"{contest.script}.py"), str(order)],
            _environment(setting, num_threads),
            scratch / f"{contest.name}.log",
        )
        try:
            self.started = self._process.receive()
        except BaseException:
            self._process.close()
            raise

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send a line that its script knows."""
        return self._process.ask(order)

    def run(self, streams: Streams) -> dict[str, Any]:
        """Run all streams by one call."""
        reported = self._process.ask(
            {
                "prompts": [prompt.token_ids for prompt in streams.prompts],
                "models": [None if model is None else model.name for model in streams.models],
                "num_new": streams.num_new,
            }
        )
        tokens = reported.pop("tokens")
        return reported | {"num_tokens": [len(row) for row in tokens], "answers": tokens}

    def pause(self) -> None:
        """Stand still."""
        self._process.pause()

    def resume(self) -> None:
        """Continue."""
        self._process.resume()

    def close(self) -> None:
        """End it."""
        self._process.close()


class TransformersServe:
    """`transformers serve` and our client, over TCP."""

    def __init__(
        self,
        contest: Contest,
        setting: Setting,
        *,
        base: Path,
        num_threads: int,
        client: Client,
        tokenizer: Tokenizer,
        scratch: Path,
    ) -> None:
        assert contest.environment is not None
        python = ensure_environment(contest.environment)
        port = free_port()
        self._url, self._base = f"http://127.0.0.1:{port}", str(base)
        self._client, self._tokenizer = client, tokenizer
        command = [str(python.parent / "transformers"), "serve", str(base), "--device", "cpu"]
        command += ["--continuous-batching", "--attn-implementation", setting.options["attention"]]
        command += ["--cb-num-blocks", str(NUM_CACHE_PAGES)]
        command += ["--dtype", "bfloat16", "--port", str(port), "--host", "127.0.0.1"]
        self._process = Process(command, _environment(setting, num_threads), scratch / f"{contest.name}.log")
        self.started: dict[str, Any] = {}
        try:
            self._wait_until_ready(Prompt([1], "Hello"))
        except BaseException:
            self._process.close()
            raise

    def _wait_until_ready(self, prompt: Prompt) -> None:
        deadline, error = time.monotonic() + _START_SECONDS, None
        while time.monotonic() < deadline:
            self._process.check()
            error = self._client.send(self._url, [self._request(prompt, 1)])["answers"][0]["error"]
            if error is None:
                return
            time.sleep(1.0)
        raise SideFailedError(f"not ready within {_START_SECONDS:.0f} s: {error}")

    def _request(self, prompt: Prompt, num_new: int) -> dict[str, Any]:
        body = completion_body(self._base, prompt.text, num_new=num_new)
        # It has no such field, and takes the most probable token where its configuration says so.
        del body["stream_options"]
        body["generation_config"] = json.dumps({"do_sample": False})
        return {"path": COMPLETIONS, "body": body}

    def run(self, streams: Streams) -> dict[str, Any]:
        """Ask for all streams at once."""
        requests = [self._request(prompt, streams.num_new) for prompt in streams.prompts]
        return read_answers(self._client.send(self._url, requests), self._tokenizer, streams.num_new)

    def pause(self) -> None:
        """Stand still."""
        self._process.pause()

    def resume(self) -> None:
        """Continue."""
        self._process.resume()

    def close(self) -> None:
        """End it."""
        self._process.close()


def _environment(setting: Setting, num_threads: int) -> dict[str, str]:
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if setting.sleeps else {}
    return quiet_environment(num_threads) | waiting


def _count(answer: dict[str, Any], tokens: list[int], num_new: int) -> int:
    """Return how many tokens an answer has: as it says, or all where it says that it ran into its limit."""
    if answer["num_tokens"] is not None:
        return int(answer["num_tokens"])
    return num_new if answer["finish"] == "length" else len(tokens)


def read_answers(reported: dict[str, Any], tokenizer: Tokenizer, num_new: int) -> dict[str, Any]:
    """Return a run over HTTP as a run in process reports it, with what only a stream shows."""
    answers = reported["answers"]
    errors = [answer["error"] for answer in answers if answer["error"] is not None]
    if errors:
        raise SideFailedError(f"{len(errors)} of {len(answers)} requests failed: {errors[0]}")
    tokens = [tokenizer.encode(answer["text"]) for answer in answers]
    counted = [_count(answer, row, num_new) for row, answer in zip(tokens, answers, strict=True)]
    gaps = [gap for answer in answers for gap in answer["gaps"]] or [0.0]
    firsts = [(answer["end"] if answer["first"] is None else answer["first"]) for answer in answers]
    return {
        "seconds": max(answer["end"] for answer in answers) - min(answer["sent"] for answer in answers),
        "num_tokens": counted,
        "answers": tokens,
        "first_token_seconds_p50": percentile(firsts, 0.5),
        "gap_seconds_p50": percentile(gaps, 0.5),
        "gap_seconds_p99": percentile(gaps, 0.99),
    }


def texts_as_tokens(answers: list[list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Return answers as the tokens of their texts, as what comes over HTTP has no others."""
    return [tokenizer.encode(tokenizer.decode(row)) for row in answers]
