"""Every failure that a user may see, and the one error that names a field which pydantic refused.

Raised anywhere; only api/errors.py turns it into HTTP, only the worker into a failed job. Messages say what
is wrong and what to do, and hold no text of datasets, prompts or answers beyond 40 escaped characters.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar


def error_body(message: str, type_: str, code: str | None, param: str | None) -> dict[str, Any]:
    """Return OpenAI's error object, the one shape of every error; all four members are always there."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


class LuthierError(Exception):
    """A failure with a stable code.

    Args:
        message: one or two sentences for the user: what is wrong, what to do.
        param: the field, dotted for nested ones, that the failure is about.
    """

    code: ClassVar[str | None] = "server_error"
    http_status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    # Whether the same request may succeed later without a change by the caller.
    retryable: ClassVar[bool] = False
    # When, if it may; SDKs wait for that long.
    retry_after_seconds: ClassVar[int] = 1

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def to_body(self) -> dict[str, Any]:
        """Return the failure as OpenAI's error object."""
        return error_body(self.message, self.type, self.code, self.param)


class InvalidRequestError(LuthierError):
    """A request that breaks a rule of the wire."""

    code = "invalid_request"
    http_status = 400
    type = "invalid_request_error"


class MissingParameterError(InvalidRequestError):
    """A required field is absent."""

    code = "missing_required_parameter"


class UnknownParameterError(InvalidRequestError):
    """A field that no part of the service knows."""

    code = "unknown_parameter"


class InvalidTypeError(InvalidRequestError):
    """A field holds a value of another type."""

    code = "invalid_type"


class InvalidValueError(InvalidRequestError):
    """A field is out of its range or outside its list of values."""

    code = "invalid_value"


class UnsupportedValueError(InvalidRequestError):
    """A value that OpenAI's API knows and this service does not offer (yet)."""

    code = "unsupported_value"


class InvalidFileFormatError(InvalidRequestError):
    """An uploaded file whose lines break the format; nothing of it is kept.

    Args:
        faults: a sentence for each fault that was found; the message quotes the first few.
    """

    code = "invalid_file_format"

    def __init__(self, message: str, *, param: str | None = None, faults: Sequence[str] = ()) -> None:
        super().__init__(message, param=param)
        self.faults = faults


class InvalidFilePurposeError(InvalidRequestError):
    """A file used for something other than its purpose."""

    code = "invalid_file_purpose"


class TooFewRowsError(InvalidRequestError):
    """A training file with fewer rows than a job needs."""

    code = "invalid_n_examples"


class FileInUseError(InvalidRequestError):
    """A file that an unfinished job reads can't be deleted."""

    code = "file_in_use"


class ModelNotAvailableError(InvalidRequestError):
    """A base that no job can be started on: unknown, or not fetchable."""

    code = "model_not_available"


class ModelInUseError(InvalidRequestError):
    """A tuned model that other models continue from or depend on can't be deleted."""

    code = "model_in_use"


class PinLimitError(InvalidRequestError):
    """A model that would take its project's pinned models over their share of the memory."""

    code = "pin_limit_exceeded"


class ContextLengthExceededError(InvalidRequestError):
    """A prompt, or prompt and answer together, longer than the base's context."""

    code = "context_length_exceeded"


class InvalidTransitionError(InvalidRequestError):
    """An act that the job's status does not allow."""

    code = "invalid_job_state"


class InvalidUploadStateError(InvalidRequestError):
    """An act that the upload's status does not allow."""

    code = "invalid_upload_state"


class WebhookUnreachableError(InvalidRequestError):
    """A receiver that gave no HTTP answer to a test."""

    code = "webhook_unreachable"


class IdempotencyKeyReusedError(InvalidRequestError):
    """An idempotency key that came before with another body."""

    code = "idempotency_key_reused"


class UnauthenticatedError(LuthierError):
    """No key, or one that is unknown or revoked."""

    code = "invalid_api_key"
    http_status = 401
    type = "invalid_request_error"


class PermissionDeniedError(LuthierError):
    """A key without the right that the act needs."""

    code = "missing_scope"
    http_status = 403
    type = "insufficient_permissions"


class NotFoundError(LuthierError):
    """No such object, or none in the caller's project; the two are never distinguished."""

    code = "not_found"
    http_status = 404
    type = "invalid_request_error"


class ModelNotFoundError(NotFoundError):
    """No model of that name in the caller's project; never answered by the base instead."""

    code = "model_not_found"


class PreconditionFailedError(LuthierError):
    """A condition of the request, such as If-Match, that does not hold."""

    code = "precondition_failed"
    http_status = 412
    type = "invalid_request_error"


class TooLargeError(LuthierError):
    """A body over the limit; nothing of it is kept."""

    code = "file_too_large"
    http_status = 413
    type = "invalid_request_error"


class HeadersTooLargeError(LuthierError):
    """Request line and headers over the limit; the connection is closed."""

    code = "headers_too_large"
    http_status = 431
    type = "invalid_request_error"


class RangeNotSatisfiableError(LuthierError):
    """A range that begins behind the end of what is asked for."""

    code = "range_not_satisfiable"
    http_status = 416
    type = "invalid_request_error"


class TooManyRequestsError(LuthierError):
    """More requests than may wait; the same one succeeds a little later."""

    code = "rate_limit_exceeded"
    http_status = 429
    type = "requests"
    retryable = True


class UnavailableError(LuthierError):
    """A part of the service can't be reached right now."""

    code = "service_unavailable"
    http_status = 503
    retryable = True


class StorageRefusedError(UnavailableError):
    """Storage that answers, and refuses: rights, credentials, bucket or folder; only an operator can help."""

    code = "storage_refused"
    retryable = False


class SecretKeyError(LuthierError):
    """The key that seals stored secrets is missing, malformed or another one; only an operator can help."""

    code = "secret_key"
    http_status = 503


class JobError(LuthierError):
    """A failure that ends a job; its code becomes `job.error.code`."""


class InvalidTrainingFileError(JobError):
    """Rows of the training file that can't be trained on."""

    code = "invalid_training_file"


class InvalidValidationFileError(JobError):
    """Rows of the validation file that can't be scored."""

    code = "invalid_validation_file"


class BaseUnavailableError(JobError):
    """A base that could not be fetched, read or verified."""

    code = "base_unavailable"


class UnsuitableParentError(JobError):
    """A tuned model that the job can't continue from: changed since, of another base, or of other shapes."""

    code = "unsuitable_parent"


class NonFiniteLossError(JobError):
    """Loss or gradient became infinite or not a number."""

    code = "non_finite_loss"


class TooMuchForgettingError(JobError):
    """Every checkpoint raised the loss on general text by more than the job allows."""

    code = "too_much_forgetting"


class OutOfMemoryError(JobError):
    """The device has too little memory for the job."""

    code = "out_of_memory"


class StorageFullError(JobError):
    """A disk that has no room left; the operator must make some."""

    code = "storage_full"
    http_status = 507
    retryable = True


class UnsuitableMachineError(JobError):
    """A machine that can't continue a job as it was begun; another one may."""

    code = "unsuitable_machine"
    http_status = 503
    retryable = True


class WorkerCrashedError(JobError):
    """The training process ended without a word in every attempt."""

    code = "worker_crashed"


class StalledError(JobError):
    """Training, or the check of a file, made no progress for too long in every attempt."""

    code = "stalled"


class ArtifactCorruptError(JobError):
    """Stored bytes that do not match their manifest."""

    code = "artifact_corrupt"
    http_status = 503
    retryable = True


class SelfCheckError(JobError):
    """A step that could not prove itself, such as an adapter that leaves the logits unchanged."""

    code = "self_check_failed"


def make_job_error(code: str | None, message: str, param: str | None) -> JobError:
    """Return the failure of a job that another process names by its code."""
    classes = {
        cls.code: cls for cls in globals().values() if isinstance(cls, type) and issubclass(cls, JobError)
    }
    return classes.get(code, JobError)(message, param=param)


_LIKENESS = 0.7
# No longer than a field's name is: comparing a million characters takes seconds.
_MAX_CHARACTERS = 80
_MAX_SHOWN_CHARACTERS = 40


def field_error(
    kind: str, param: str | None, message: str, *, advice: str = "Leave it out."
) -> InvalidRequestError:
    """Return the error of a pydantic finding of type `kind`, such as `missing` or `string_type`.

    `message` is for a wrong value, `advice` for an unknown field.
    """
    if kind == "missing":
        return MissingParameterError(f"Missing required parameter: '{param}'.", param=param)
    if kind == "extra_forbidden":
        return UnknownParameterError(f"Unknown parameter: '{param}'. {advice}", param=param)
    is_type = kind.endswith(("_type", "_parsing"))
    return (InvalidTypeError if is_type else InvalidValueError)(message, param=param)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to an unknown one, or None."""
    near = difflib.get_close_matches(name[:_MAX_CHARACTERS], list(known), n=1, cutoff=_LIKENESS)
    return near[0] if near else None


def advise(name: str, known: Iterable[str]) -> str:
    """Return what to do about an unknown field."""
    near = nearest_name(name, known)
    return f"Did you mean '{near}'?" if near else "Leave it out."


def shown_part(part: str | int) -> str:
    """Return a part of a field's path as errors show it: escaped, and cut."""
    return str(part).encode("unicode_escape").decode()[:_MAX_SHOWN_CHARACTERS]
