"""`luthier jobs report` for a person: what is known so far, escaped, in any state of the job."""

from typing import Any

from luthier.cli.commands.reports import print_report

_FILE = {
    "num_rows": 24,
    "num_tokens": 900,
    "num_supervised_tokens": 300,
    "num_truncated": 1,
    "num_dropped": 2,
}


def _report(**parts: Any) -> dict[str, Any]:
    return {"object": "fine_tuning.job.report", "fine_tuning_job_id": "ftjob-1", **parts}


def _evaluation(step: int, **scores: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("valid_loss", "valid_mean_token_accuracy", "general_loss", "forgetting"))
    return {"step": step, "answers": [], **nothing, **scores}


def _run(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "method": "lora",
        "precision": "float32",
        "device": "cpu",
        "num_trained_parameters": 4,
        "num_base_parameters": 100,
        "steps_done": 3,
        "steps_planned": 9,
        "result_step": 2,
        "stopped_early": "Enough.",
        "seconds": {"load": 1.0, "train": 2.5},
        "artifact_bytes": None,
        "full_copy_bytes": 400,
        "peak_memory_bytes": 7,
        "seed": 1,
        "base_digest": "sha256:b",
        "data_sha256": "d",
        "evaluations": evaluations,
    }


def test_what_is_not_there_yet_is_said(capsys):
    print_report(_report(prepare=None, run=None))
    assert capsys.readouterr().out == "The job's files are not prepared yet.\n"
    prepared = {"training": _FILE, "validation": None, "num_train_rows": 22, "num_validation_rows": 2}
    print_report(_report(prepare=prepared, run=None))
    printed = capsys.readouterr().out
    assert "rows: 22 to train on, 2 to validate on" in printed
    assert "training file: 24 rows, 900 tokens, 300 supervised, 1 rows truncated, 2 dropped" in printed
    assert printed.endswith("Training has not been scored yet.\n")


def test_scores_are_a_table_and_answers_stand_below_escaped(capsys):
    evaluations = [
        _evaluation(0, valid_loss=3.0, answers=[{"prompt": "who?", "answer": "\x1b[31mred"}]),
        _evaluation(2, valid_loss=1.5, forgetting=0.1, answers=[{"prompt": "who?", "answer": "me"}]),
    ]
    print_report(_report(prepare={"training": _FILE, "validation": _FILE}, run=_run(evaluations)))
    lines = capsys.readouterr().out.splitlines()
    assert "steps: 3 of 9, result: 2" in lines
    assert "Enough." in lines
    assert "seed: 1; SHA-256 of the base: sha256:b, of the rows: d" in lines
    # As an older version stored it.
    assert not [line for line in lines if line.startswith("rows:")]
    assert [line.split() for line in lines if line.startswith(("0 ", "2 "))] == [
        ["0", "3.0000", "-", "-", "-"],
        ["2", "1.5000", "-", "-", "0.1000"],
    ]
    assert lines[-3:] == ["who?", "  step 0: \\x1b[31mred", "  step 2: me"]


def test_a_job_that_went_on_names_what_it_started_from_and_scores_the_base_first(capsys):
    run = _run([_evaluation(0, general_loss=3.5), _evaluation(2, general_loss=3.75, forgetting=0.25)])
    run |= {
        "started_from": {"name": "ft:b:o::\x1b1234567", "digest": "sha256:1"},
        "base_evaluation": _evaluation(0, general_loss=3.0),
    }
    print_report(_report(prepare={"training": _FILE, "validation": None}, run=run))
    lines = capsys.readouterr().out.splitlines()
    assert "started from: ft:b:o::\\x1b1234567 (sha256:1)" in lines
    table = lines[-3:]
    assert [line.split()[0] for line in table] == ["base", "0", "2"]
    assert table[0].split() == ["base", "-", "-", "3.0000", "-"]
