"""The tables. Postgres is the only truth of the service: specs, rows and states are here, bytes are not."""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Index,
    MetaData,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


# Deleted rows whose bytes may still be in storage.
_BYTES_LEFT = text("deleted_at IS NOT NULL AND bytes_deleted_at IS NULL")


def _undeleted_index(name: str, *columns: str, **options: Any) -> Index:
    return Index(name, *columns, postgresql_where=text("deleted_at IS NULL"), **options)


class Table(DeclarativeBase):
    """Base of all tables: text for strings, jsonb for objects, timestamps with zone."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text(),
        int: BigInteger(),
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        dict[str, str]: JSONB(none_as_null=True),
    }


class Owned:
    """Columns of every row that belongs to a project. A deleted row keeps its id for ever."""

    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_by_key_id: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deleted_at: Mapped[datetime | None]

    def owner_columns(self) -> dict[str, str | None]:
        """Return the columns of a new row that belongs to the same project."""
        names = ("organization_id", "project_id", "created_by_key_id")
        return {name: getattr(self, name) for name in names}


class Organization(Table):
    """Owner of projects; its slug is part of every tuned model's name."""

    __tablename__ = "organizations"
    id: Mapped[str] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deleted_at: Mapped[datetime | None]


class Project(Table):
    """The tenant: a key sees the rows of one project and no others."""

    __tablename__ = "projects"
    __table_args__ = (UniqueConstraint("organization_id", "name"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deleted_at: Mapped[datetime | None]


class ApiKey(Owned, Table):
    """A key: its hash and the prefix by which it is shown. The key itself is nowhere."""

    __tablename__ = "api_keys"
    name: Mapped[str]
    prefix: Mapped[str]
    key_hash: Mapped[str] = mapped_column(unique=True)
    is_admin: Mapped[bool]
    last_used_at: Mapped[datetime | None]


class File(Owned, Table):
    """An uploaded file; its bytes are under `storage_key`."""

    __tablename__ = "files"
    __table_args__ = (
        _undeleted_index("ix_files_page", "project_id", "created_at", "id"),
        Index(
            "ix_files_expiring",
            "expires_at",
            postgresql_where=text("expires_at IS NOT NULL AND deleted_at IS NULL"),
        ),
        Index("ix_files_undeleted_bytes", "deleted_at", postgresql_where=_BYTES_LEFT),
    )
    filename: Mapped[str]
    purpose: Mapped[str]
    num_bytes: Mapped[int]
    num_rows: Mapped[int]
    sha256: Mapped[str]
    storage_key: Mapped[str]
    # How its rows are written; None for files without rows, and those of a version that did not note it.
    row_format: Mapped[str | None]
    # From then on it is unknown to its project, as a deleted one is; None: never.
    expires_at: Mapped[datetime | None]
    bytes_deleted_at: Mapped[datetime | None]


class Base(Table):
    """A base model that has been fetched somewhere; `facts` is its base.json."""

    __tablename__ = "bases"
    id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    tokenizer_digest: Mapped[str]
    context_length: Mapped[int]
    facts: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Job(Owned, Table):
    """A fine-tuning job. The queued row is itself the message to workers; the lease names its worker.

    `lease_epoch` is the fencing token: it grows with every claim, and every write of an attempt names it.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        _undeleted_index("ix_jobs_page", "project_id", "created_at", "id"),
        # The two filters of the list: pairs that all must match, and no metadata at all.
        Index(
            "ix_jobs_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "ix_jobs_page_plain",
            "project_id",
            "created_at",
            "id",
            postgresql_where=text("deleted_at IS NULL AND metadata IS NULL"),
        ),
        Index(
            "ix_jobs_unfinished",
            "status",
            "created_at",
            postgresql_where=text("status IN ('validating_files', 'queued', 'running', 'pausing')"),
        ),
        Index(
            "ix_jobs_waiting",
            "project_id",
            postgresql_where=text("status IN ('validating_files', 'queued', 'paused')"),
        ),
        Index(
            "ix_jobs_speeds",
            "base_id",
            "finished_at",
            postgresql_where=text("status = 'succeeded'"),
        ),
        # What has ended and has working copies left in storage.
        Index(
            "ix_jobs_untidied",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL AND tidied_at IS NULL"),
        ),
    )
    status: Mapped[str]
    model: Mapped[str]
    base_id: Mapped[str]
    # The tuned model that the job continues. The two tables name each other, so this key is added last.
    parent_model_id: Mapped[str | None] = mapped_column(
        ForeignKey("models.id", name="fk_jobs_parent_model_id", use_alter=True), index=True
    )
    spec: Mapped[dict[str, Any]]
    training_file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), index=True)
    validation_file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"), index=True)
    suffix: Mapped[str | None]
    seed: Mapped[int]
    # `metadata` is taken by SQLAlchemy.
    user_metadata: Mapped[dict[str, str] | None] = mapped_column("metadata")
    # The trackers that follow it, as OpenAI's wire has them; no secret is among it.
    integrations: Mapped[list[Any] | None] = mapped_column(JSONB(none_as_null=True))
    # Storage prefix of the tokenised rows, once prepare has written them.
    prepared_key: Mapped[str | None]
    # Device memory of its training process, as prepare estimated it: at its peak, and at least.
    peak_bytes: Mapped[int | None]
    least_bytes: Mapped[int | None]
    # The newest save points, oldest first: {"key": storage prefix, "step": number}.
    save_points: Mapped[list[Any]] = mapped_column(JSONB, server_default=text("'[]'::jsonb"))
    # {"prepare": what the files held, "run": luthier.core.events.RunReport}, each once it is there; up to
    # a megabyte, so it is read only by who asks for it.
    report: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    # The step metrics of a job that succeeded, until a user deletes them.
    result_file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"), index=True)
    error: Mapped[dict[str, Any] | None]
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None]
    step: Mapped[int] = mapped_column(server_default="0")
    total_steps: Mapped[int | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    estimated_finish_at: Mapped[datetime | None]
    lease_owner: Mapped[str | None]
    lease_epoch: Mapped[int] = mapped_column(server_default="0")
    lease_expires_at: Mapped[datetime | None]
    # Since the newest save point: training processes that died, workers that stopped answering, and tries in
    # a row at something that was away or refused.
    num_crashes: Mapped[int] = mapped_column(server_default="0")
    num_losses: Mapped[int] = mapped_column(server_default="0")
    num_faults: Mapped[int] = mapped_column(server_default="0")
    # The code of what those tries met.
    fault_code: Mapped[str | None]
    # Ids of workers that take it again only when no other can, or some minutes after `not_before`.
    avoided_workers: Mapped[list[Any]] = mapped_column(JSONB, server_default=text("'[]'::jsonb"))
    # No worker claims it before; a fault sets it.
    not_before: Mapped[datetime | None]
    # What its last event of that kind says that it waits for.
    waits_for: Mapped[str | None]
    # When what an ended job no longer needs was deleted from storage.
    tidied_at: Mapped[datetime | None]
    last_event_seq: Mapped[int] = mapped_column(server_default="0")


class Attempt(Owned, Table):
    """One claim of a job by a worker: from which step, and how it ended."""

    __tablename__ = "attempts"
    __table_args__ = (
        UniqueConstraint("job_id", "lease_epoch"),
        Index("ix_attempts_turns", "project_id", "stage", "created_at"),
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    lease_epoch: Mapped[int]
    worker_id: Mapped[str]
    # "prepare" or "train"
    stage: Mapped[str] = mapped_column(server_default="train")
    start_step: Mapped[int | None]
    end_step: Mapped[int | None]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]


class JobEvent(Owned, Table):
    """What happened to a job; `seq` counts per job from 1, and thinned steps leave gaps."""

    __tablename__ = "job_events"
    __table_args__ = (UniqueConstraint("job_id", "seq"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    seq: Mapped[int]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]


class Model(Owned, Table):
    """A name that can be called: a base and an artifact. `kind` is `tuned` or `checkpoint`.

    `parent_model_id` is the model that its job continued; `full_model_id` the full model below an adapter,
    which replaces the base's own weights. Inference servers keep a pinned one in memory.
    """

    __tablename__ = "models"
    __table_args__ = (
        _undeleted_index("uq_models_name", "name", unique=True),
        _undeleted_index("ix_models_project", "project_id", "created_at"),
        Index("ix_models_undeleted_bytes", "deleted_at", postgresql_where=_BYTES_LEFT),
    )
    name: Mapped[str]
    kind: Mapped[str]
    base_id: Mapped[str]
    base_digest: Mapped[str]
    parent_model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"), index=True)
    full_model_id: Mapped[str | None] = mapped_column(
        "foundation_model_id", ForeignKey("models.id"), index=True
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    method: Mapped[str]
    step: Mapped[int]
    artifact_key: Mapped[str]
    artifact_digest: Mapped[str]
    bytes_deleted_at: Mapped[datetime | None]
    pinned_at: Mapped[datetime | None]


class Checkpoint(Owned, Table):
    """A checkpoint of a job, callable under its model's name."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step_number"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    step_number: Mapped[int]
    metrics: Mapped[dict[str, Any]]


class IdempotencyKey(Owned, Table):
    """A create that was answered, so that the same one sent again makes nothing new.

    `key` is the caller's Idempotency-Key, or None: the OpenAI SDK sends none, and its silent retry is
    then recognised by key id, route, body and its retry count.
    """

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        Index(
            "uq_idempotency_keys_key",
            "project_id",
            "route",
            "key",
            unique=True,
            postgresql_where=text("key IS NOT NULL"),
        ),
        Index("ix_idempotency_keys_body", "created_by_key_id", "route", "body_sha256", "created_at"),
        Index("ix_idempotency_keys_age", "created_at"),
    )
    route: Mapped[str]
    key: Mapped[str | None]
    body_sha256: Mapped[str]
    # The client's count of retries of the request that made it.
    num_retries: Mapped[int] = mapped_column(server_default="0")
    resource_id: Mapped[str]


class Worker(Table):
    """A worker process that is or was alive, with what it has."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(primary_key=True)
    hostname: Mapped[str]
    num_slots: Mapped[int]
    facts: Mapped[dict[str, Any]]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.now())
    # Jobs whose training process died before it said anything, since the last that did say something.
    deaths: Mapped[list[Any]] = mapped_column(JSONB, server_default=text("'[]'::jsonb"))
    num_quarantines: Mapped[int] = mapped_column(server_default="0")
    # None: it may claim jobs to train.
    quarantine_reason: Mapped[str | None]
    quarantined_until: Mapped[datetime | None]


class UsageEvent(Owned, Table):
    """What was used, for accounts; append-only.

    Of kind `training` it is one job, of kind `inference` the answers of one key and model within a second or
    so; the last four columns belong to the latter.
    """

    __tablename__ = "usage_events"
    __table_args__ = (
        Index("ix_usage_events_project", "project_id", "created_at"),
        Index("ix_usage_events_organization", "organization_id", "created_at"),
    )
    kind: Mapped[str]
    quantity: Mapped[int]
    unit: Mapped[str]
    job_id: Mapped[str | None]
    model: Mapped[str | None]
    num_requests: Mapped[int | None]
    input_tokens: Mapped[int | None]
    input_cached_tokens: Mapped[int | None]
    output_tokens: Mapped[int | None]


class Alias(Owned, Table):
    """A name that points to a model: to one of `models`, or to a base.

    What it points to is one row, so that a reader sees the old target or the new one.
    """

    __tablename__ = "aliases"
    __table_args__ = (
        _undeleted_index("uq_aliases_name", "project_id", "name", unique=True),
        _undeleted_index("ix_aliases_page", "project_id", "created_at", "id"),
        _undeleted_index("ix_aliases_model_id", "model_id"),
        CheckConstraint("num_nonnulls(model_id, base_id) = 1", name="ck_aliases_target"),
    )
    name: Mapped[str]
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    base_id: Mapped[str | None]
    # The number of the version that says the same.
    version: Mapped[int]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class AliasVersion(Owned, Table):
    """One target that an alias was pointed to; append-only, `number` gap-free from 1.

    `digest` is that of the target's weights at the time; `restored_number` the version that a rollback took
    the target from, which is itself no rollback.
    """

    __tablename__ = "alias_versions"
    __table_args__ = (
        UniqueConstraint("alias_id", "number"),
        CheckConstraint("num_nonnulls(model_id, base_id) = 1", name="ck_alias_versions_target"),
    )
    alias_id: Mapped[str] = mapped_column(ForeignKey("aliases.id"))
    number: Mapped[int]
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    base_id: Mapped[str | None]
    digest: Mapped[str]
    restored_number: Mapped[int | None]


class CheckpointPermission(Owned, Table):
    """The right of another project to call a model; `project_id` is the owner's, as everywhere."""

    __tablename__ = "checkpoint_permissions"
    __table_args__ = (
        _undeleted_index("uq_checkpoint_permissions_grantee", "model_id", "grantee_project_id", unique=True),
        _undeleted_index("ix_checkpoint_permissions_grantee", "grantee_project_id"),
    )
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    grantee_project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))


class WebhookEndpoint(Owned, Table):
    """A client's receiver. Its secrets are sealed (luthier.webhooks.sealing), empty once there is none."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (_undeleted_index("ix_webhook_endpoints_page", "project_id", "created_at", "id"),)
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]] = mapped_column(ARRAY(Text))
    secret: Mapped[str]
    # The end of it, which is shown.
    secret_hint: Mapped[str] = mapped_column(server_default="")
    # The one before, which signs too until its time is over.
    old_secret: Mapped[str | None]
    old_secret_expires_at: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WebhookDelivery(Owned, Table):
    """One event for one endpoint, written in the transaction in which the job ended.

    `next_try_at` is also the lease: who claims a delivery moves it on and counts the try, and its answer is
    written only while `num_tries` is still that of its claim.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "next_try_at", postgresql_where=text("finished_at IS NULL")),
        Index(
            "ix_webhook_deliveries_finished",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
    )
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    event_id: Mapped[str]
    event_type: Mapped[str]
    num_tries: Mapped[int] = mapped_column(server_default="0")
    next_try_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]
    # "delivered", "given_up", "endpoint_deleted".
    outcome: Mapped[str | None]
    last_status_code: Mapped[int | None]
    # Our own words, never the receiver's.
    last_error: Mapped[str | None]


class Upload(Owned, Table):
    """A file that is sent in parts. Its parts, and the file's own bytes, share one prefix in storage.

    `status` is `pending`, `completed`, `cancelled` or `expired`; the last is written when somebody looks.
    """

    __tablename__ = "uploads"
    __table_args__ = (
        Index("ix_uploads_untidied", "status", "ended_at", postgresql_where=text("tidied_at IS NULL")),
    )
    filename: Mapped[str]
    purpose: Mapped[str]
    mime_type: Mapped[str]
    # What the client said that all parts together hold.
    num_bytes: Mapped[int]
    # When the file expires, in seconds after it is made; None: never.
    file_expires_after_seconds: Mapped[int | None]
    status: Mapped[str]
    expires_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    # Until then its parts are being read by a complete that began in time.
    busy_until: Mapped[datetime | None]
    # What the complete that made the file named, so that the same one sent again is known.
    part_ids: Mapped[list[Any] | None] = mapped_column(JSONB(none_as_null=True))
    md5: Mapped[str | None]
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    # When the bytes of its parts were deleted from storage.
    tidied_at: Mapped[datetime | None]


class UploadPart(Owned, Table):
    """A piece of an upload, durable under `storage_key`; its place is said when the upload is completed."""

    __tablename__ = "upload_parts"
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    num_bytes: Mapped[int]
    storage_key: Mapped[str]


class MemoryGrant(Table):
    """What an attempt has of training's part of a device; it lapses unless it is renewed with its lease."""

    __tablename__ = "memory_grants"
    job_id: Mapped[str] = mapped_column(primary_key=True)
    lease_epoch: Mapped[int] = mapped_column(primary_key=True)
    hostname: Mapped[str]
    device: Mapped[str]
    num_bytes: Mapped[int]
    expires_at: Mapped[datetime]
