"""DSPy's BootstrapFinetune as a client: a teacher's traces are uploaded, trained on, and the model called.

Prints what it saw as one JSON object. Environment: OPENAI_BASE_URL and OPENAI_API_KEY, which DSPy's
fine-tuning goes by, and MODEL, a base.
"""

import functools
import json
import os
from typing import Literal

import dspy
from dspy.clients.openai import OpenAIProvider
from dspy.utils import DummyLM

THINGS = {
    "parcel": "delivery",
    "courier": "delivery",
    "refund": "payment",
    "invoice": "payment",
    "password": "account",
    "login": "account",
}


class Sort(dspy.Signature):
    """Sort a message to a shop."""

    message: str = dspy.InputField()
    category: Literal["delivery", "payment", "account"] = dspy.OutputField()


def main() -> None:
    """Tune a student on what a teacher answers, and ask it."""
    # It would ask every 20 seconds.
    OpenAIProvider.wait_for_job = staticmethod(
        functools.partial(OpenAIProvider.wait_for_job, poll_frequency=1)
    )
    lm = dspy.LM(
        f"openai/{os.environ['MODEL']}",
        api_base=os.environ["OPENAI_BASE_URL"],
        api_key=os.environ["OPENAI_API_KEY"],
        temperature=0.0,
        max_tokens=40,
        cache=False,
    )
    student, teacher = dspy.Predict(Sort), dspy.Predict(Sort)
    student.set_lm(lm)
    rows = [
        dspy.Example(message=f"{text} my {thing}", category=category).with_inputs("message")
        for text in ("Where is", "I have trouble with", "Please look at", "Tell me about")
        for thing, category in THINGS.items()
    ]
    teacher.set_lm(DummyLM({row.message: {"category": row.category} for row in rows}))
    optimizer = dspy.BootstrapFinetune(
        metric=lambda row, found, trace=None: row.category == found.category,
        train_kwargs={"n_epochs": 2, "batch_size": 4},
        num_threads=1,
    )
    tuned = optimizer.compile(student, trainset=rows, teacher=teacher)
    name = tuned.predictors()[0].lm.model
    # DSPy (3.4.1, clients/lm.py: _run_finetune_job) names the tuned model without its provider, and litellm
    # (get_llm_provider_logic.py) takes only names that begin with ft:gpt-3.5-turbo or ft:gpt-4 for OpenAI's.
    tuned.set_lm(tuned.predictors()[0].lm.copy(model=f"openai/{name.removeprefix('openai/')}"))
    answers = [str(tuned(message=row.message).category) for row in rows[:6]]
    reported = {
        "version": dspy.__version__,
        "model": name.removeprefix("openai/"),
        "answers": answers,
        "expected": [row.category for row in rows[:6]],
    }
    print(json.dumps(reported))


main()
