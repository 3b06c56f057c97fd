"""Rows that join and leave, beside forward passes over the whole text, for every method on every shape."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier.inference.runner import Batch, Runner
from luthier.methods import Attached, Method, Start, Workload, discover, parse_tuning
from tests.tiny_shapes import NUM_POSITIONS, SHAPES, build_shape, facts_of
from tests.unit.inference.artifacts import TUNINGS, add_noise, load_plain

# One is longer than the sliding windows of the shapes, one as short as can be.
PROMPTS = [[5, 6, 7], [20 + i % 60 for i in range(31)], [9]]


def make_artifact(base: Path, folder: Path, name: str, shape: str) -> Method:
    method, params = parse_tuning({"type": name, **TUNINGS.get(name, [{}])[0]})
    resolved = method.resolve(params, Workload(base=facts_of(shape), num_rows=100, num_tokens=3000))
    start = Start(seed=1, base_id=f"tiny-{shape}", tokenize=lambda text: list(text.encode()))
    attached = method.attach(load_plain(base), resolved, start)
    add_noise(attached, seed=1, scale=0.2)
    folder.mkdir()
    method.save(attached, folder)
    return method


def make_ready(base: Path, folder: Path, method: Method) -> Any:
    if method.is_whole_model:
        whole = load_plain(folder)
        return SimpleNamespace(activate=lambda: whole, prefix=[], num_virtual_tokens=0)
    causal_lm = load_plain(base)
    installed = method.install(causal_lm, folder, "a")
    installed.switch_on()
    prefix = installed.prefix()
    num_virtual = prefix[0][0].shape[1] if prefix else 0
    return SimpleNamespace(activate=lambda: causal_lm, prefix=prefix, num_virtual_tokens=num_virtual)


class Rows:
    """Rows in a runner, each with its text so far and a reference to check it by."""

    def __init__(self, method: Method, attached: Attached, ready: Any) -> None:
        self._method, self._attached, self._ready = method, attached, ready
        self._runner = Runner()
        self._batch: Batch | None = None
        self._texts: list[list[int]] = []

    def join(self, prompts: list[list[int]]) -> None:
        rows: Any = [
            SimpleNamespace(served=self._ready, prompt_ids=prompt, wants_prompt_scores=False)
            for prompt in prompts
        ]
        batch, logits_BV = self._runner.prefill(rows)
        texts = [list(prompt) for prompt in prompts]
        self._check(texts, logits_BV)
        if self._batch is None:
            self._batch, self._texts = batch, texts
        else:
            self._runner.merge(self._batch, batch)
            self._texts += texts

    def keep(self, rows: list[int]) -> None:
        assert self._batch is not None
        self._runner.keep(self._batch, rows)
        self._texts = [self._texts[row] for row in rows]

    def step(self, num_steps: int) -> None:
        assert self._batch is not None
        for _ in range(num_steps):
            logits_BV = self._runner.step(self._batch, [text[-1] for text in self._texts])
            self._check(self._texts, logits_BV)

    @property
    def num_cells_per_row(self) -> int:
        assert self._batch is not None
        return int(self._batch.cache.layers[0].keys.shape[2])

    def _check(self, texts: list[list[int]], logits_BV: torch.Tensor) -> None:
        """Compare with the method's own passes over each whole text, then go on with the likeliest token."""
        for text, logits_V in zip(texts, logits_BV, strict=True):
            with torch.inference_mode():
                expected_V = self._method.logits(self._attached, torch.tensor([text]))[0, -1]
            torch.testing.assert_close(logits_V, expected_V, rtol=1e-4, atol=1e-4)
            text.append(int(expected_V.argmax()))


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("name", list(discover()))
def test_rows_that_join_and_leave_answer_as_the_method_does_for_each_whole_text(
    tmp_path: Path, name: str, shape: str
) -> None:
    base = build_shape(tmp_path / "base", shape)
    method = make_artifact(base, tmp_path / "artifact", name, shape)
    ready = make_ready(base, tmp_path / "artifact", method)
    rows = Rows(method, method.load(load_plain(base), tmp_path / "artifact"), ready)
    rows.join(PROMPTS[:2])
    rows.step(3)
    rows.join(PROMPTS[2:])
    rows.step(3)
    rows.keep([0, 2])
    # The longest has left, and its padding with it.
    assert rows.num_cells_per_row == ready.num_virtual_tokens + len(PROMPTS[0]) + 6
    rows.step(2)
    rows.join([PROMPTS[1]])
    rows.step(2)


def test_a_text_may_fill_a_base_of_learned_positions_to_the_last_one(tmp_path: Path) -> None:
    base = build_shape(tmp_path / "base", "gpt2")
    method = make_artifact(base, tmp_path / "artifact", "prefix", "gpt2")
    ready = make_ready(base, tmp_path / "artifact", method)
    rows = Rows(method, method.load(load_plain(base), tmp_path / "artifact"), ready)
    rows.join([[7] * (NUM_POSITIONS - ready.num_virtual_tokens - 1)])
    rows.step(1)
