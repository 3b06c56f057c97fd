"""The task that prepares a job, with real PostgreSQL and storage: what it finds, keeps and passes on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from alembic import command
from sqlalchemy import text

from db.migrate import alembic_config
from db.session import Database
from luthier.core.settings import MIB
from luthier.core.specs import TrainingSpec
from luthier.data.prepare.preparation import RowLimits
from luthier.data.prepare.process import ANSWER_NAME, QUESTION_NAME, Question
from tests.conftest import Api
from tests.rows import chat_row, colour_rows
from tests.training import Jobs
from worker.context import WorkerContext
from worker.processes import work
from worker.tasks import prepare as prepare_module
from worker.tasks import train as train_module
from worker.tasks.prepare import prepare
from worker.training_process.supervisor import Ending

ROWS = colour_rows(24)


def test_a_too_long_sample_prompt_fails_the_job_by_its_place(jobs: Jobs) -> None:
    job_id = jobs.prepared(rows=ROWS, training={"sample_prompts": ["who?", "a? " * 300]})
    error = jobs.error(job_id)
    assert (error.code, error.param) == ("invalid_value", "training.sample_prompts.1")
    assert "a? a?" not in str(jobs.messages(job_id))


def test_rows_that_virtual_tokens_push_out_of_the_context_are_found_by_prepare_with_their_lines(
    jobs: Jobs,
) -> None:
    tuning = {"type": "prompt", "num_virtual_tokens": 246}
    job_id = jobs.prepared(rows=ROWS, tuning=tuning)
    error = jobs.error(job_id)
    assert error.code == "invalid_training_file"
    assert "Line 1:" in error.message
    assert "more than the 10 allowed" in error.message


@pytest.mark.parametrize(
    ("too_long", "num_long", "what"),
    [
        ("drop", 1, "0 truncated, 1 dropped (training.too_long); line 23"),
        ("truncate", 7, "7 truncated, 0 dropped (training.too_long); line 23, 24, 25, 26, 27, …"),
    ],
)
def test_events_name_lines_that_are_too_long_and_a_limit_that_the_base_has_no_room_for(
    jobs: Jobs, too_long: str, num_long: int, what: str
) -> None:
    rows = [*colour_rows(22), *[chat_row("what?", "the sky is blue. " * 100)] * num_long]
    tuning = {"type": "prompt", "num_virtual_tokens": 6}
    job_id = jobs.prepared(rows=rows, tuning=tuning, training={"max_length": 5000, "too_long": too_long})
    reported = jobs.messages(job_id)
    assert f"Rows of the training file longer than the limit: {what}." in reported
    assert any(message.startswith("training.max_length is 250, not 5000:") for message in reported)


def test_a_report_says_what_a_split_leaves_on_each_side(jobs: Jobs) -> None:
    job_id = jobs.prepared(rows=ROWS, training={"validation_split": 0.25})
    found = jobs.report(job_id)["prepare"]
    assert found["validation"] is None
    assert found["num_validation_rows"] > 0
    assert found["num_train_rows"] + found["num_validation_rows"] == found["training"]["num_rows"] == 24


def test_the_files_own_hashes_and_the_seconds_are_in_the_report(jobs: Jobs) -> None:
    job_id = jobs.prepared(rows=ROWS)
    report = jobs.report(job_id)["prepare"]
    assert report["training"]["file_id"] == jobs.get(job_id).training_file
    assert len(report["training"]["sha256"]) == 64
    assert 0 < report["tokenize_seconds"] < 60


def test_a_job_has_an_event_when_its_base_is_fetched_and_none_where_it_is_there(
    jobs: Jobs, context: WorkerContext, tmp_path: Path
) -> None:
    reported = "Fetching the base model tiny-llama, which this machine does not have yet"
    there, fetched = jobs.create(), jobs.create()
    prepare(context, there)
    assert reported not in jobs.messages(there)
    entry = context.catalogue.bases["tiny-llama"]
    source = f"path:{context.settings.bases_dir.absolute() / 'tiny-llama'}"
    bases = {**context.catalogue.bases, "tiny-llama": entry.model_copy(update={"source": source})}
    context.catalogue = context.catalogue.model_copy(update={"bases": bases})
    context.settings = context.settings.model_copy(update={"bases_dir": tmp_path / "empty"})
    prepare(context, fetched)
    assert jobs.messages(fetched).count(reported) == 1
    assert jobs.status(fetched) == "queued"


def test_others_are_notified_of_a_job_only_where_its_worker_can_not_take_it(
    jobs: Jobs, api: Api, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    def note(_context: WorkerContext, claimed: train_module.Claimed, *_: object) -> Ending:
        run.append(claimed.lease.job_id)
        return Ending.SUCCEEDED

    monkeypatch.setattr(train_module, "_run", note)
    # Nothing keeps the lease of the first.
    context.settings = context.settings.model_copy(update={"lease_seconds": 60.0})
    first, second = jobs.create(), jobs.create()
    prepare(context, first)
    assert jobs.claim()
    api.notified.clear()
    # The only slot is taken; others may have one.
    work(context)
    assert (run, api.notified) == ([], [second])
    third = jobs.create()
    api.notified.clear()
    context.settings = context.settings.model_copy(update={"training_slots": 2})
    # The older job goes first, so others are notified of the newer one.
    work(context)
    assert (run, api.notified) == ([second], [third])


def test_no_worker_is_notified_where_the_process_that_prepared_a_job_trains_it(
    jobs: Jobs, api: Api, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "_run", lambda *_: Ending.SUCCEEDED)
    jobs.create()
    api.notified.clear()
    work(context)
    assert api.notified == []


@pytest.mark.parametrize(("device", "is_known"), [("cpu", True), ("cuda", False)])
def test_auto_may_depend_on_the_memory_of_the_training_device_where_it_is_known(
    jobs: Jobs, context: WorkerContext, monkeypatch: pytest.MonkeyPatch, device: str, is_known: bool
) -> None:
    seen: list[int | None] = []
    resolve = prepare_module.resolve_spec

    def watch(spec: TrainingSpec, **facts: Any) -> TrainingSpec:
        seen.append(facts["memory_bytes"])
        return resolve(spec, **facts)

    monkeypatch.setattr(prepare_module, "resolve_spec", watch)
    context.settings = context.settings.model_copy(update={"device": device})
    jobs.prepared()
    assert seen == [context.facts["memory_bytes"] if is_known else None]


def test_a_report_of_the_first_schema_is_carried_into_the_second_and_back(
    jobs: Jobs, database: Database
) -> None:
    job_id = jobs.prepared(rows=ROWS)
    read = text("SELECT report FROM jobs")
    with database.engine.begin() as connection:
        after = connection.scalar(read)
        command.downgrade(alembic_config(connection), "0001")
        before = connection.scalar(read)
        assert set(before) == {"training", "validation"}
        command.upgrade(alembic_config(connection), "head")
        again = connection.scalar(read)
    assert again["prepare"]["training"] == after["prepare"]["training"] == before["training"]
    assert jobs.report(job_id)["prepare"]["tokenize_seconds"] == 0.0


@pytest.mark.parametrize(
    ("setting", "limit", "reported"),
    [
        ("max_training_rows", 20, "more than 20 rows, the limit of one file: 24 in its first 24 rows"),
        ("max_training_tokens", 100, "more than 100 tokens, the limit of one file"),
    ],
)
def test_a_file_over_a_limit_fails_by_name_limit_and_what_to_do(
    jobs: Jobs, context: WorkerContext, setting: str, limit: int, reported: str
) -> None:
    context.settings = context.settings.model_copy(update={setting: limit})
    job_id = jobs.prepared(rows=ROWS)
    error = jobs.error(job_id)
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert reported in error.message
    assert f"Split it, or ask the operator to raise LUTHIER_{setting.upper()}." in error.message


def test_a_check_that_takes_more_memory_than_it_may_fails_by_name(jobs: Jobs, context: WorkerContext) -> None:
    context.settings = context.settings.model_copy(update={"max_prepare_bytes": 24 * MIB})
    job_id = jobs.prepared(rows=colour_rows(20_000), training={"validation_split": 0.5})
    error = jobs.error(job_id)
    assert error.code == "out_of_memory"
    assert "LUTHIER_MAX_PREPARE_BYTES" in error.message


def _peak_bytes(folder: Path, base: Path, num_rows: int) -> int:
    """Prepare a file of tiny rows in a process, and return the most memory that it had."""
    folder.mkdir()
    (folder / "training").write_bytes(b'{"text":"a b"}\n' * num_rows)
    question = Question(
        base_folder=str(base),
        max_length=256,
        too_long="error",
        has_pairs=False,
        validation_split=0.0,
        has_validation_file=False,
        limits=RowLimits(),
        max_memory_bytes=2048 * MIB,
    )
    (folder / QUESTION_NAME).write_bytes(msgspec.json.encode(question))
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier.data.prepare.process", str(folder)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert b'"num_train_rows":%d' % num_rows in (folder / ANSWER_NAME).read_bytes()
    return usage.ru_maxrss * 1024


def test_memory_hardly_grows_with_the_rows_of_a_file(tiny_base: Path, tmp_path: Path) -> None:
    few = _peak_bytes(tmp_path / "few", tiny_base / "tiny-llama", 5_000)
    many = _peak_bytes(tmp_path / "many", tiny_base / "tiny-llama", 80_000)
    assert (many - few) / 75_000 < 100, "bytes a row"
