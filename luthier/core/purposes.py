"""What a file is for, in OpenAI's words. Only the rows of training files are checked."""

from luthier.core.errors import InvalidValueError, UnsupportedValueError

FINE_TUNE = "fine-tune"
INPUT_PURPOSES = ("assistants", "batch", FINE_TUNE, "vision", "user_data", "evals")
# What the service itself makes; OpenAI's API has them in answers only.
OUTPUT_PURPOSES = ("assistants_output", "batch_output", "fine-tune-results")

# Kinds of content that can't be rows, so that gigabytes of it are refused before they are sent.
_NEVER_ROWS = ("image/", "audio/", "video/", "font/", "application/pdf")


def check_input_purpose(purpose: str) -> str:
    """Return a purpose that a client may give a file.

    Args:
        purpose: as the client wrote it.

    Raises:
        UnsupportedValueError: when only the service makes files of that purpose.
        InvalidValueError: when there is none of that name.
    """
    if purpose in INPUT_PURPOSES:
        return purpose
    if purpose in OUTPUT_PURPOSES:
        raise UnsupportedValueError(
            f"purpose: files of purpose '{purpose}' are made by the service and can't be uploaded; "
            f"use one of {', '.join(INPUT_PURPOSES)}.",
            param="purpose",
        )
    raise InvalidValueError(
        f"purpose: {purpose[:40]!r} is unknown; use one of {', '.join(INPUT_PURPOSES)}.", param="purpose"
    )


def check_mime_type(mime_type: str, purpose: str) -> None:
    """Refuse a kind of content that can't be what the purpose says.

    Nothing else is inferred from it: clients send many names for the same rows.

    Args:
        mime_type: as the client wrote it.

    Raises:
        InvalidValueError: when it is a picture, a sound or the like for training.
    """
    if purpose == FINE_TUNE and mime_type.strip().lower().startswith(_NEVER_ROWS):
        raise InvalidValueError(
            f"mime_type: {mime_type[:40]!r} can't be a training file; send JSON lines, as 'text/jsonl'.",
            param="mime_type",
        )
