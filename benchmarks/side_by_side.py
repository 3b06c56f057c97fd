"""Tune on rows of a chat file and answer another file's inputs by base and tuned model side by side.

    python -m benchmarks.side_by_side --train dev.jsonl --rows 600 --questions test.jsonl --answers 50

Needs a running service: OPENAI_BASE_URL and OPENAI_API_KEY. Writes losses and answers as Markdown.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai


def tune(client: openai.OpenAI, rows: bytes, model: str, epochs: int) -> tuple[str, list[dict[str, Any]]]:
    """Run a LoRA job and return the model's name and the metrics of its events, oldest first."""
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        seed=1,
        hyperparameters={"n_epochs": epochs},
        extra_body={"training": {"validation_split": 0.1}},
    )
    print(job.id, flush=True)
    while job.finished_at is None:
        time.sleep(5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.fine_tuned_model is None:
        raise SystemExit(f"{job.status}: {job.error}")
    events = [event for event in client.fine_tuning.jobs.list_events(job.id, limit=1000) if event.data]
    return job.fine_tuned_model, [dict(event.data) for event in reversed(events)]  # type: ignore[call-overload]


def answer(client: openai.OpenAI, model: str, question: str) -> str:
    """Return a greedy answer in one line."""
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=64
    )
    return " ".join((chat.choices[0].message.content or "").split())


def distinct_questions(path: Path, limit: int) -> list[str]:
    """Return the first distinct user turns of a chat file."""
    questions: dict[str, None] = {}
    for line in path.read_text().splitlines():
        questions.setdefault(json.loads(line)["messages"][0]["content"])
        if len(questions) == limit:
            break
    return list(questions)


def main() -> None:
    """Tune, ask, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    client = openai.OpenAI(timeout=300)
    rows = arguments.train.read_bytes().splitlines(keepends=True)[: arguments.rows]
    begin = time.perf_counter()
    tuned, metrics = tune(client, b"".join(rows), arguments.model, arguments.epochs)
    seconds = time.perf_counter() - begin
    questions = distinct_questions(arguments.questions, arguments.answers)
    with ThreadPoolExecutor(16) as pool:
        of_base = list(pool.map(lambda question: answer(client, arguments.model, question), questions))
        of_tuned = list(pool.map(lambda question: answer(client, tuned, question), questions))
    scored = [entry for entry in metrics if "full_valid_loss" in entry or "base" in entry]
    lines = [f"{len(rows)} rows, {arguments.epochs} epochs, {seconds:.0f} s: {tuned}", ""]
    lines += [f"- {json.dumps(entry)}" for entry in [*metrics[:3], *metrics[-1:], *scored]]
    for question, base, better in zip(questions, of_base, of_tuned, strict=True):
        lines += ["", f"**{question}**", f"- base: {base}", f"- tuned: {better}"]
    arguments.out.write_text("\n".join(lines) + "\n")
    print(f"{arguments.out} written", flush=True)


if __name__ == "__main__":
    main()
