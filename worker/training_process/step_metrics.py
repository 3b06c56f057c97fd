"""The result file of a job: OpenAI's step metrics, one row a step that is kept, as plain CSV."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

FILENAME = "step_metrics.csv"
# The classic guide says train_accuracy, newer servers train_mean_token_accuracy: readers of both find theirs.
COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "train_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
# What a job on preferences measures beside.
REWARD_COLUMNS = (
    "train_reward_accuracy",
    "train_reward_margin",
    "full_valid_reward_accuracy",
    "full_valid_reward_margin",
)


def build_step_metrics(steps: Iterable[Mapping[str, Any]]) -> tuple[bytes, int]:
    """Write the table.

    Returns:
        The CSV with a header, and its rows without it. A cell is empty where nothing was measured. The
        validation rows are scored whole or not at all, so both pairs of validation columns say the same.
    """
    steps = list(steps)
    has_rewards = any("train_reward_margin" in step for step in steps)
    columns = COLUMNS + (REWARD_COLUMNS if has_rewards else ())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    num_rows = 0
    for step in steps:
        values = {
            "train_accuracy": step.get("train_mean_token_accuracy"),
            "valid_loss": step.get("full_valid_loss"),
            "valid_mean_token_accuracy": step.get("full_valid_mean_token_accuracy"),
            **step,
        }
        writer.writerow([values.get(column) for column in columns])
        num_rows += 1
    return text.getvalue().encode(), num_rows
