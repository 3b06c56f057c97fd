"""Which rows an objective learns from: dpo from preferences, supervised from every other format."""

from typing import Literal

# Which of a job's files it is.
Purpose = Literal["training", "validation"]

_PREFERENCE = "preference"


def learns_from(format_name: str, *, wants_pairs: bool) -> bool:
    return (format_name == _PREFERENCE) == wants_pairs


def wrong_format_message(purpose: Purpose, format_name: str) -> str:
    """Return the error of a file whose rows its job does not learn from."""
    if format_name == _PREFERENCE:
        return (
            f"The {purpose} file holds preferences (input, preferred_output, non_preferred_output), which "
            "belong to jobs of method dpo; a supervised job learns from rows such as chats. Set method.type "
            'to "dpo", or name a file of other rows.'
        )
    return (
        f"The {purpose} file holds rows of the format {format_name}, and a job of method dpo learns from "
        "preferences: input, preferred_output and non_preferred_output. Set method.type to "
        '"supervised", or name a file of preferences.'
    )
