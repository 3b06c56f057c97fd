"""What a run reports of itself, and that its numbers are those of plain PyTorch."""

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.core.events import EvaluatedEvent, RunReport, StepEvent, TrainingEvent
from luthier.core.specs import BaseFacts, TrainingSpec
from luthier.data.prepare.batch_plan import make_plan
from luthier.data.prepare.prepared_rows import PreparedRows, read_prepared
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.methods import Start, discover
from luthier.methods._tuning import parse_tuning
from luthier.modeling.load import load_base
from luthier.training.loop import gradient_accumulation as halving_module
from luthier.training.loop.evaluation import general_passages, general_rows
from luthier.training.loop.gradient_accumulation import StepScores
from tests.tiny import build_tiny_run
from tests.training_runs import Build, failed, finished, run_here

METHODS = list(discover())
PROMPTS = ["what is the colour of the sky?", "an answer"]
SETTINGS: dict[str, Any] = {
    "num_rows": 12,
    "num_validation_rows": 3,
    "hyperparameters": {"n_epochs": 2, "batch_size": 4},
    "training": {"save_every_steps": 2, "learning_rate": 5e-3, "sample_prompts": PROMPTS},
}
# Four rows of 12 to 47 tokens: every step has several micro-batches.
MAX_TOKENS = 64


class Run:
    """A run directory that was run, with five passages of general text, and what its run said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events = run_here(folder, max_tokens=MAX_TOKENS, num_passages=5)
        self.end = finished(self.events)
        self.report = self.end.report
        self.spec = TrainingSpec.model_validate_json((folder / "spec.json").read_text())
        self.rows = read_prepared(folder / "train.safetensors")
        self.validation_rows = read_prepared(folder / "validation.safetensors")


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / request.param
    return Run(build_tiny_run(folder, base, **SETTINGS, tuning={"type": request.param}))


def test_the_report_names_what_was_trained_on_what_by_which_code(run: Run, base: Path) -> None:
    facts = BaseFacts.model_validate_json((base / "base.json").read_text())
    assert (run.report.method, run.report.seed, run.report.spec) == (run.spec.tuning["type"], 11, run.spec)
    assert (run.report.device, run.report.precision, run.report.num_threads) == ("cpu", "float32", 1)
    assert run.report.path in {"fused", "plain"}
    assert run.report.base_digest == facts.digest
    for name, digest in (("train", run.report.data_sha256), ("validation", run.report.validation_sha256)):
        assert digest == hashlib.sha256((run.folder / f"{name}.safetensors").read_bytes()).hexdigest()
    assert run.report.versions == {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("luthier", "torch", "transformers", "peft")},
    }
    assert run.report.num_base_parameters == facts.num_parameters
    assert run.report.full_copy_bytes == 4 * facts.num_parameters
    assert run.report.num_trained_parameters == run.end.num_trained_parameters


def test_the_report_counts_tokens_seconds_bytes_and_memory(run: Run) -> None:
    assert run.report.tokens_seen == run.end.trained_tokens == 2 * run.rows.num_tokens
    assert run.report.supervised_tokens_seen == 2 * run.rows.num_supervised_tokens
    assert (run.report.steps_done, run.report.steps_planned, run.report.result_step) == (6, 6, 6)
    assert run.report.stopped_early is None
    manifest = json.loads((run.folder / "artifact" / "manifest.json").read_text())
    sizes = [(run.folder / "artifact" / name).stat().st_size for name in manifest["digested"]]
    assert run.report.artifact_bytes == sum(sizes)
    assert run.report.artifact_digest == run.end.digest == manifest["digest"]
    seconds = run.report.seconds
    assert seconds.tokenize == 0.0
    assert min(seconds.load, seconds.train, seconds.evaluate, seconds.save) > 0.0
    assert seconds.load + seconds.train + seconds.evaluate + seconds.save <= run.end.seconds
    assert run.report.tokens_per_second == pytest.approx(run.report.tokens_seen / seconds.train)
    peaks = [event.peak_memory_bytes for event in run.events if event.type == "step"]
    # More than torch itself takes, and never less than what a step said.
    assert run.report.peak_memory_bytes >= max(peaks) > 100 * 1024**2


def test_every_evaluation_is_reported_with_the_whole_report_so_far(run: Run) -> None:
    evaluated = [event for event in run.events if isinstance(event, EvaluatedEvent)]
    assert [event.evaluation.step for event in evaluated] == [0, 3, 6]
    assert [event.evaluation.epoch for event in evaluated] == [0.0, 1.0, 2.0]
    for number, event in enumerate(evaluated, start=1):
        assert event.report.evaluations == [earlier.evaluation for earlier in evaluated[:number]]
        assert event.report.steps_done == event.evaluation.step
        assert event.report.result_step is None
        assert (event.report.artifact_bytes is None) == (event.evaluation.step == 0)
    checkpoints = [event.step for event in run.events if event.type == "checkpoint"]
    assert checkpoints == [3, 6]
    # A checkpoint's publisher finds its evaluation in the checkpoint's log.
    assert run.report.evaluations == [event.evaluation for event in evaluated]


def test_the_first_evaluation_is_the_bases_and_forgetting_what_came_after(run: Run, base: Path) -> None:
    first, *later = run.report.evaluations
    causal_lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def logits(token_ids_BT: torch.Tensor) -> torch.Tensor:
        return causal_lm(token_ids_BT).logits

    rows = general_rows(Tokenizer.load(base), 256)
    rows = rows.select([index for index in range(rows.num_rows) if rows.lines[index] <= 5])
    assert first.general_loss == pytest.approx(mean_loss(logits, rows), rel=1e-4)
    assert first.valid_loss == pytest.approx(mean_loss(logits, run.validation_rows), rel=1e-4)
    assert first.forgetting is None
    assert [answer.prompt for answer in first.answers] == PROMPTS
    assert [answer.answer for answer in first.answers] == [answer_of(logits, base, p) for p in PROMPTS]
    for evaluation in later:
        assert evaluation.general_loss is not None
        assert evaluation.forgetting == evaluation.general_loss - first.general_loss
        assert evaluation.valid_mean_token_accuracy is not None
        assert len(evaluation.answers) == len(PROMPTS)


def test_the_last_evaluation_is_of_the_artifact(run: Run, base: Path) -> None:
    last = run.report.evaluations[-1]
    method, _ = parse_tuning(run.spec.tuning)
    attached = method.load(load_base(base, dtype=torch.float32, device="cpu"), run.folder / "artifact")
    # By the method's own plain path.
    tuned = functools.partial(method.logits, attached)
    assert last.valid_loss == pytest.approx(mean_loss(tuned, run.validation_rows), rel=1e-4)
    assert [answer.answer for answer in last.answers] == [answer_of(tuned, base, p) for p in PROMPTS]


Logits = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def mean_loss(logits: Logits, rows: PreparedRows) -> float:
    """Score rows one by one over full logits."""
    total, count = 0.0, 0
    for tokens, targets_T in each_row(rows):
        logits_TV = logits(tokens[None])[0, :-1]
        total += torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum").item()
        count += int((targets_T != -100).sum())
    return total / count


def each_row(rows: PreparedRows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield every row's tokens, and its targets with -100 where nothing is supervised."""
    for index in range(rows.num_rows):
        tokens, supervised = rows.row(index)
        token_ids = torch.from_numpy(tokens.astype(np.int64))
        yield token_ids, token_ids[1:].masked_fill(torch.from_numpy(~supervised[1:]), -100)


@torch.no_grad()
def answer_of(logits: Logits, base: Path, prompt: str) -> str:
    """Answer greedily without any cache: the whole sequence is read again for every token."""
    tokenizer = Tokenizer.load(base)
    messages = [{"role": "user", "content": prompt}]
    token_ids = tokenizer.encode(ChatTemplate.load(base).render(messages, add_generation_prompt=True))
    generated: list[int] = []
    while len(generated) < 64:
        token_id = int(logits(torch.tensor([[*token_ids, *generated]]))[0, -1].argmax())
        if token_id in tokenizer.stop_token_ids:
            break
        generated.append(token_id)
    return tokenizer.decode(generated).replace("\0", "\N{REPLACEMENT CHARACTER}")


def test_losses_are_those_of_plain_pytorch_on_the_same_batches_row_by_row(run: Run, base: Path) -> None:
    steps = [event for event in run.events if isinstance(event, StepEvent)]
    expected = list(plain_losses(run, base, [event.learning_rate for event in steps]))
    assert [event.metrics.train_loss for event in steps] == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 6


def plain_losses(run: Run, base: Path, rates: list[float]) -> Iterator[float]:
    """Train without any of the training code: Trainer's loss (a sum over all supervised tokens of the batch,
    divided by their number), gradients accumulated over single rows, clipping, AdamW."""
    spec, rows = run.spec, run.rows
    method, params = parse_tuning(spec.tuning)
    causal_lm = load_base(base, dtype=torch.float32, device="cpu")
    examples = [rows.row(index)[0].tolist() for index in range(rows.num_rows)]
    tokenize = Tokenizer.load(base).encode
    attached = method.attach(causal_lm, params, Start(spec.seed, spec.base_id, tokenize, examples))
    model = attached.model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=spec.training.weight_decay)
    plan = make_plan(rows.lengths, batch_size=4, num_epochs=2, seed=spec.seed)
    for row_numbers, rate in zip(plan.steps, rates, strict=True):
        batch = list(each_row(rows.select([int(number) for number in row_numbers])))
        count = sum(int((targets != -100).sum()) for _, targets in batch)
        total = 0.0
        for tokens, targets in batch:
            # Prompt tuning's wrapper answers for its virtual tokens too, which come first.
            logits_TV = model(input_ids=tokens[None]).logits[0, -len(tokens) : -1]
            loss = torch.nn.functional.cross_entropy(logits_TV, targets, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, spec.training.max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        yield total


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_no_number_stops_the_run_at_its_step(
    method: str, monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    training = {"save_every_steps": 1, "learning_rate": 5e-3}
    folder = build("run", **SETTINGS | {"training": training}, tuning={"type": method})
    break_gradient(monkeypatch, at_call=2)
    event = failed(run_here(folder))
    assert (event.code, event.is_retryable) == ("non_finite_loss", False)
    rows = read_prepared(folder / "train.safetensors")
    plan = make_plan(rows.lengths, batch_size=4, num_epochs=2, seed=11)
    lines = ", ".join(str(line) for line in sorted(rows.lines[plan.steps[1]]))
    assert f"step 2 is not finite; it trained on lines {lines} of" in event.message
    assert [path.name for path in (folder / "save_points").iterdir()] == ["step-000001"]
    assert not (folder / "artifact").exists()
    assert not (folder / "checkpoints").exists()
    # What was kept is finite: the next attempt continues from it to the end.
    monkeypatch.undo()
    assert finished(run_here(folder))


def test_what_a_user_asks_the_model_is_in_the_report_and_nowhere_else(run: Run) -> None:
    # A short answer may be found by chance.
    texts = PROMPTS[:1] + [a.answer for e in run.report.evaluations for a in e.answers if len(a.answer) > 20]
    reported_elsewhere = [e.model_dump_json() for e in run.events if e.type not in {"evaluated", "finished"}]
    written = [path.read_bytes() for path in (run.folder / "artifact").iterdir()]
    for text in texts:
        assert not any(json.dumps(text)[1:-1] in line for line in reported_elsewhere)
        assert not any(text.encode() in content for content in written)


def break_gradient(monkeypatch: pytest.MonkeyPatch, *, at_call: int) -> None:
    """Let one number of one gradient be no number, at one step; its loss is an ordinary one."""
    compute, num_calls = halving_module.compute_gradients, 0

    def broken(training_model: Any, *arguments: Any, **options: Any) -> StepScores:
        nonlocal num_calls
        num_calls += 1
        if num_calls != at_call:
            return compute(training_model, *arguments, **options)
        _, weight = training_model.attached.named_trained_parameters()[-1]
        hook = weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), float("nan")))
        try:
            return compute(training_model, *arguments, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(halving_module, "compute_gradients", broken)


def test_seconds_tokens_and_memory_are_added_up_over_attempts(build: Build) -> None:
    folder = build("run", **SETTINGS)
    first = run_here(folder, kill_after=lambda event: event.type == "save_point" and event.step == 4)
    before = RunReport.model_validate(last_report(first))
    after = finished(run_here(folder)).report
    for phase in ("load", "train", "evaluate", "save"):
        assert getattr(after.seconds, phase) > getattr(before.seconds, phase)
    rows = read_prepared(folder / "train.safetensors")
    assert after.tokens_seen == 2 * rows.num_tokens
    assert after.peak_memory_bytes >= before.peak_memory_bytes


def last_report(events: list[TrainingEvent]) -> RunReport:
    return [event for event in events if isinstance(event, EvaluatedEvent)][-1].report


def test_the_general_text_is_long_enough_and_all_but_a_passages_first_token_count(base: Path) -> None:
    rows = general_rows(Tokenizer.load(base), 4096)
    assert len(general_passages()) >= 40
    assert len(set(general_passages())) == len(general_passages())
    assert rows.num_supervised_tokens == rows.num_tokens - rows.num_rows
    short = general_rows(Tokenizer.load(base), 64)
    assert max(short.lengths) == 64
    assert short.num_tokens == rows.num_tokens
