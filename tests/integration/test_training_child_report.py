"""What a run reports of itself, and that its numbers are those of plain PyTorch."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
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
from luthier.methods import Attached, Method, Start, discover
from luthier.methods._tuning import parse_tuning
from luthier.modeling.load import load_base
from luthier.training.loop import gradient_accumulation as halving_module
from luthier.training.loop.evaluation import general_passages, general_rows
from luthier.training.loop.gradient_accumulation import StepScores
from tests.tiny import build_tiny_base, build_tiny_run
from tests.training_runs import failed, finished, run_here

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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="module", params=METHODS)
def reported_run(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[TrainingEvent]]:
    """A run directory of each method, and what its run said; five passages of general text."""
    folder = tmp_path_factory.mktemp("told") / request.param
    build_tiny_run(folder, base, **SETTINGS, tuning={"type": request.param})
    return folder, run_here(folder, max_tokens=MAX_TOKENS, num_passages=5)


def spec_of(folder: Path) -> TrainingSpec:
    return TrainingSpec.model_validate_json((folder / "spec.json").read_text())


def test_the_report_names_what_was_trained_on_what_by_which_code(
    reported_run: tuple[Path, list[TrainingEvent]], base: Path
) -> None:
    folder, events = reported_run
    report, spec = finished(events).report, spec_of(folder)
    facts = BaseFacts.model_validate_json((base / "base.json").read_text())
    assert (report.method, report.seed, report.spec) == (spec.tuning["type"], 11, spec)
    assert (report.device, report.precision, report.num_threads) == ("cpu", "float32", 1)
    assert report.path in {"fused", "plain"}
    assert report.base_digest == facts.digest
    for name, digest in (("train", report.data_sha256), ("validation", report.validation_sha256)):
        assert digest == hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
    assert report.versions == {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("luthier", "torch", "transformers", "peft")},
    }
    assert report.num_base_parameters == facts.num_parameters
    assert report.full_copy_bytes == 4 * facts.num_parameters
    assert report.num_trained_parameters == finished(events).num_trained_parameters


def test_the_report_counts_tokens_seconds_bytes_and_memory(
    reported_run: tuple[Path, list[TrainingEvent]],
) -> None:
    folder, events = reported_run
    report = finished(events).report
    rows = read_prepared(folder / "train.safetensors")
    assert report.tokens_seen == finished(events).trained_tokens == 2 * rows.num_tokens
    assert report.supervised_tokens_seen == 2 * rows.num_supervised_tokens
    assert (report.steps_done, report.steps_planned, report.result_step) == (6, 6, 6)
    assert report.stopped_early is None
    manifest = json.loads((folder / "artifact" / "manifest.json").read_text())
    sizes = [(folder / "artifact" / name).stat().st_size for name in manifest["digested"]]
    assert report.artifact_bytes == sum(sizes)
    assert report.artifact_digest == finished(events).digest == manifest["digest"]
    seconds = report.seconds
    assert seconds.tokenize == 0.0
    assert min(seconds.load, seconds.train, seconds.evaluate, seconds.save) > 0.0
    assert seconds.load + seconds.train + seconds.evaluate + seconds.save <= finished(events).seconds
    assert report.tokens_per_second == pytest.approx(report.tokens_seen / seconds.train)
    peaks = [event.peak_memory_bytes for event in events if event.type == "step"]
    # More than torch itself takes, and never less than what a step said.
    assert report.peak_memory_bytes >= max(peaks) > 100 * 1024**2


def test_every_evaluation_is_reported_with_the_whole_report_so_far(
    reported_run: tuple[Path, list[TrainingEvent]],
) -> None:
    _, events = reported_run
    evaluated = [event for event in events if isinstance(event, EvaluatedEvent)]
    assert [event.evaluation.step for event in evaluated] == [0, 3, 6]
    assert [event.evaluation.epoch for event in evaluated] == [0.0, 1.0, 2.0]
    for number, event in enumerate(evaluated, start=1):
        assert event.report.evaluations == [earlier.evaluation for earlier in evaluated[:number]]
        assert event.report.steps_done == event.evaluation.step
        assert event.report.result_step is None
        assert (event.report.artifact_bytes is None) == (event.evaluation.step == 0)
    checkpoints = [event.step for event in events if event.type == "checkpoint"]
    assert checkpoints == [3, 6]
    # A checkpoint's publisher finds its evaluation in the checkpoint's log.
    assert finished(events).report.evaluations == [event.evaluation for event in evaluated]


def test_the_first_evaluation_is_the_base_and_forgetting_is_what_came_after_minus_it(
    reported_run: tuple[Path, list[TrainingEvent]], base: Path
) -> None:
    folder, events = reported_run
    first, *later = finished(events).report.evaluations
    causal_lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows = general_rows(Tokenizer.load(base), 256)
    rows = rows.select([index for index in range(rows.num_rows) if rows.lines[index] <= 5])
    assert first.general_loss == pytest.approx(mean_loss(causal_lm, rows), rel=1e-4)
    valid = read_prepared(folder / "validation.safetensors")
    assert first.valid_loss == pytest.approx(mean_loss(causal_lm, valid), rel=1e-4)
    assert first.forgetting is None
    assert [answer.prompt for answer in first.answers] == PROMPTS
    assert [answer.answer for answer in first.answers] == [answer_of(causal_lm, base, p) for p in PROMPTS]
    for evaluation in later:
        assert evaluation.general_loss is not None
        assert evaluation.forgetting == evaluation.general_loss - first.general_loss
        assert evaluation.valid_mean_token_accuracy is not None
        assert len(evaluation.answers) == len(PROMPTS)


def test_the_last_evaluation_is_of_the_artifact(
    reported_run: tuple[Path, list[TrainingEvent]], base: Path
) -> None:
    folder, events = reported_run
    last = finished(events).report.evaluations[-1]
    method, _ = parse_tuning(spec_of(folder).tuning)
    attached = method.load(load_base(base, dtype=torch.float32, device="cpu"), folder / "artifact")
    tuned = Tuned(method, attached)
    valid = read_prepared(folder / "validation.safetensors")
    assert last.valid_loss == pytest.approx(mean_loss(tuned, valid), rel=1e-4)
    assert [answer.answer for answer in last.answers] == [answer_of(tuned, base, p) for p in PROMPTS]


class Tuned:
    """A tuned model as a function from tokens to logits, by the method's own plain path."""

    def __init__(self, method: Method, attached: Attached) -> None:
        self._method = method
        self._attached = attached

    def __call__(self, token_ids_BT: torch.Tensor) -> Any:
        logits_BTV = self._method.logits(self._attached, token_ids_BT)
        return type("Output", (), {"logits": logits_BTV})


@torch.no_grad()
def mean_loss(model: Any, rows: PreparedRows) -> float:
    """Score rows one by one over full logits."""
    total, count = 0.0, 0
    for tokens, targets_T in each_row(rows):
        logits_TV = model(tokens[None]).logits[0, :-1]
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
def answer_of(model: Any, base: Path, prompt: str) -> str:
    """Answer greedily without any cache: the whole sequence is read again for every token."""
    tokenizer = Tokenizer.load(base)
    messages = [{"role": "user", "content": prompt}]
    token_ids = tokenizer.encode(ChatTemplate.load(base).render(messages, add_generation_prompt=True))
    generated: list[int] = []
    while len(generated) < 64:
        token_id = int(model(torch.tensor([[*token_ids, *generated]])).logits[0, -1].argmax())
        if token_id in tokenizer.stop_token_ids:
            break
        generated.append(token_id)
    return tokenizer.decode(generated).replace("\0", "\N{REPLACEMENT CHARACTER}")


def test_losses_are_those_of_plain_pytorch_on_the_same_batches_row_by_row(
    reported_run: tuple[Path, list[TrainingEvent]], base: Path
) -> None:
    folder, events = reported_run
    steps = [event for event in events if isinstance(event, StepEvent)]
    expected = list(plain_losses(folder, base, [event.learning_rate for event in steps]))
    assert [event.metrics.train_loss for event in steps] == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 6


def plain_losses(folder: Path, base: Path, rates: list[float]) -> Iterator[float]:
    """Train without any of the training code: Trainer's loss (a sum over all supervised tokens of the batch,
    divided by their number), gradients accumulated over single rows, clipping, AdamW."""
    spec, rows = spec_of(folder), read_prepared(folder / "train.safetensors")
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
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"save_every_steps": 1, "learning_rate": 5e-3}
    folder = build_tiny_run(
        tmp_path / "run", base, **SETTINGS | {"training": training}, tuning={"type": method}
    )
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


def test_what_a_user_asks_the_model_is_in_the_report_and_nowhere_else(
    reported_run: tuple[Path, list[TrainingEvent]],
) -> None:
    folder, events = reported_run
    report = finished(events).report
    # A short answer may be found by chance.
    texts = PROMPTS[:1] + [a.answer for e in report.evaluations for a in e.answers if len(a.answer) > 20]
    reported_elsewhere = [e.model_dump_json() for e in events if e.type not in {"evaluated", "finished"}]
    written = [path.read_bytes() for path in (folder / "artifact").iterdir()]
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


def test_seconds_tokens_and_memory_are_added_up_over_attempts(base: Path, tmp_path: Path) -> None:
    folder = build_tiny_run(tmp_path / "run", base, **SETTINGS)
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


def test_the_general_text_is_long_enough_and_every_token_but_the_first_of_a_passage_counts(
    base: Path,
) -> None:
    rows = general_rows(Tokenizer.load(base), 4096)
    assert len(general_passages()) >= 40
    assert len(set(general_passages())) == len(general_passages())
    assert rows.num_supervised_tokens == rows.num_tokens - rows.num_rows
    short = general_rows(Tokenizer.load(base), 64)
    assert max(short.lengths) == 64
    assert short.num_tokens == rows.num_tokens
