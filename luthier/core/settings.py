"""Settings, read once by each shell (prefix LUTHIER_, or a .env file), then passed down as values."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


def _default_bases_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "luthier" / "bases"


def _default_models_file() -> Path:
    local = Path("models.toml")
    return local if local.exists() else Path(__file__).resolve().parents[1] / "bases" / "models.toml"


class Settings(BaseSettings):
    """Everything an operator can set. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="LUTHIER_", env_file=".env", extra="ignore")

    home: Path = Field(Path(".luthier"), description="Where the embedded default keeps its state.")
    database_url: SecretStr = Field(
        SecretStr("postgresql+psycopg://luthier@127.0.0.1/luthier"), description="PostgreSQL 15 or newer."
    )
    database_user: str = Field(
        "",
        description="As root: the system user who runs the database of `luthier up`; empty: luthier, made "
        "when absent, or postgres where only that is there.",
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey, to notify workers only.",
    )
    storage_url: str = Field(
        "file://.luthier/objects", description="Where bytes are kept: file:///folder or s3://bucket/prefix."
    )
    bases_dir: Path = Field(
        default_factory=_default_bases_dir, description="Folder of fetched base models, shared by all homes."
    )
    models_file: Path = Field(
        default_factory=_default_models_file, description="The catalogue of base models (models.toml)."
    )
    fetch_on_demand: bool = Field(
        False,
        description="Whether a job may name a base of models.toml that no machine has fetched; a worker then "
        "fetches it.",
    )
    runs_dir: Path = Field(Path(".luthier/runs"), description="A worker's scratch: run directories.")
    cache_dir: Path = Field(Path(".luthier/cache"), description="The inference server's copies of artifacts.")
    max_cached_artifacts: int = Field(
        64, ge=1, description="Copies of artifacts that are kept; the one unused for longest leaves first."
    )

    inference_url: str = Field(
        "unix://.luthier/run/inference.sock",
        description="unix:///path.sock or http://host:port; for the API also several, separated by commas.",
    )
    inference_processes: int = Field(
        1, ge=1, le=64, description="Inference servers of this machine, which share its cores and memory."
    )
    inference_backend: str = Field(
        "engine", description="What serves models: engine (the inference server), or vllm."
    )
    internal_token: SecretStr = Field(
        SecretStr(""), description="Shared by API and inference server; required when inference_url is http."
    )
    vllm_adapters_dir: Path = Field(
        Path(".luthier/vllm"), description="Folder in which the API lays adapters that vLLM reads."
    )
    vllm_adapters_path: str = Field(
        "", description="The same folder as vLLM sees it; empty: by the same path."
    )
    vllm_max_adapters: int = Field(
        16, ge=1, description="Adapters that each vLLM server holds; the one unused for longest leaves first."
    )
    inference_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 where it is faster, which is timed when a base is first loaded on a CPU, "
        "else float32; a model that bfloat16 rounds too much is served in float32.",
    )
    inference_max_bases_bytes: int = Field(
        0,
        ge=0,
        description="Memory for the weights of base models in each inference server; the one unused for "
        "longest leaves first. 0: three quarters of what serving has.",
    )
    inference_max_whole_models_bytes: int = Field(
        0,
        ge=0,
        description="Memory for the weights of fully tuned models in each inference server; 0: half of what "
        "serving has.",
    )
    inference_max_adapters_bytes: int = Field(
        0,
        ge=0,
        description="Memory for adapters on bases in each inference server; 0: a quarter of what "
        "serving has.",
    )
    max_pinned_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Share of an inference server's memory for adapters, and of that for fully tuned models, "
        "that the pinned models of one project may take; for API and inference servers.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train and serve.")
    memory_reserve_bytes: int = Field(
        0,
        ge=0,
        description="Memory of the device that jobs and serving leave to everything else; 0: a tenth of it.",
    )
    device_memory_bytes: int = Field(
        0,
        ge=0,
        description="Memory that jobs and serving share, where the device's own less the reserve is wrong; "
        "0: that.",
    )
    serving_memory_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of that memory for serving, in equal parts where a machine has several inference "
        "servers; the rest is for jobs. 0 where a machine only trains, 1 where it only serves.",
    )
    num_threads: int = Field(
        0,
        ge=0,
        description="CPU threads of training and of each inference server; 0: all cores, or its share.",
    )
    preload_base: str = Field(
        "smollm2-135m-instruct", description="Base that the inference server loads at start; empty: none."
    )
    max_batch_rows: int = Field(
        16, ge=1, description="Requests that are decoded together: on one base, or of one model."
    )
    max_draft_tokens: int = Field(
        7,
        ge=0,
        le=15,
        description="Tokens of an answer that are guessed from what was said before, and checked in one step "
        "with the next one; 0: none. On a CPU alone.",
    )
    max_cache_tokens: int = Field(
        65536,
        ge=1,
        description="Tokens, of prompts and answers, whose keys and values the inference server may hold.",
    )
    max_waiting_requests: int = Field(256, ge=1, description="Requests that may wait; more are answered 429.")

    cors_origins: str = Field(
        "", description="Origins whose pages may ask the API, separated by commas; * for all, empty for none."
    )
    max_connections: int = Field(
        1000, ge=1, description="Connections that an API or inference server serves; more are answered 503."
    )
    max_header_bytes: int = Field(
        65536, ge=1024, description="Largest request line and headers; more is answered 431."
    )
    header_timeout_seconds: float = Field(
        10.0, gt=0, description="How long a client may take to send whole headers."
    )
    body_timeout_seconds: float = Field(
        30.0, gt=0, description="How long a client may pause in a request's body."
    )

    max_upload_bytes: int = Field(512 * MIB, ge=1, description="Largest body of POST /v1/files.")
    max_large_upload_bytes: int = Field(
        8192 * MIB, ge=1, description="Largest file of POST /v1/uploads, all its parts together."
    )
    max_line_bytes: int = Field(8 * MIB, ge=1024, description="Longest line of an uploaded file.")
    max_expanded_bytes: int = Field(
        8192 * MIB, ge=1, description="What a compressed upload (gzip, Parquet) may expand to."
    )
    max_expansion_ratio: float = Field(
        100.0, gt=1, description="The same as a multiple of its size, beyond the first 16 MiB."
    )
    max_queued_jobs_per_project: int = Field(
        1000, ge=1, description="Jobs of a project that may wait or be paused; one more is answered 429."
    )
    max_running_uploads_per_project: int = Field(
        16, ge=1, description="Uploads in parts that a project may have open; one more is answered 429."
    )
    max_stored_bytes_per_project: int = Field(
        0, ge=0, description="Bytes of a project's files and open uploads; more is answered 413. 0: no limit."
    )
    min_free_bytes: int = Field(
        256 * MIB,
        ge=0,
        description="Free bytes on the disk of a local storage below which uploads are answered 507.",
    )
    max_tokens_default: int = Field(
        1024, ge=1, description="Answer length in tokens when a chat request names none."
    )

    max_training_rows: int = Field(5_000_000, ge=1, description="Most rows of one file of a job.")
    max_training_tokens: int = Field(
        1_000_000_000, ge=1, description="Most tokens of one file of a job, before its epochs."
    )
    max_prepare_bytes: int = Field(
        2048 * MIB, ge=256 * MIB, description="Memory that the check of a job's files may take."
    )
    training_slots: int = Field(1, ge=1, description="Jobs that one worker trains at the same time.")
    lease_seconds: float = Field(30.0, gt=0, description="How long a claim holds without a heartbeat.")
    heartbeat_seconds: float = Field(5.0, gt=0, description="Seconds between heartbeats of a running job.")
    sweep_seconds: float = Field(5.0, gt=0, description="Seconds between a worker's looks into Postgres.")
    stall_seconds: float = Field(
        600.0,
        gt=0,
        description="How long training, or the check of a file, may make no progress before it is ended and "
        "tried again; five times its longest silence so far, where that is more.",
    )
    stop_seconds: float = Field(
        30.0,
        gt=0,
        description="How long a training process may take to save when its worker stops; then it is killed.",
    )
    orphan_seconds: float = Field(
        24 * 3600.0, ge=0, description="Age from which a stored file that has no row is deleted."
    )
    control_seconds: float = Field(
        1.0, gt=0, description="Seconds between looks at whether a running job was cancelled or paused."
    )
    warm_spare_seconds: float = Field(
        600.0,
        ge=0,
        description="How long a process with its imports done may wait for a job; 0: none does.",
    )
    max_attempts: int = Field(3, ge=1, description="Crashes after which a job is failed.")

    webhook_allow_http: bool = Field(
        False, description="Whether webhook endpoints may be http:// URLs; for tests and closed networks."
    )
    webhook_allowed_targets: str = Field(
        "",
        description="Host names, addresses and CIDRs that webhooks may reach although they are internal, "
        "separated by commas.",
    )
    webhook_timeout_seconds: float = Field(
        15.0, gt=0, le=120, description="How long a webhook's receiver may take to answer."
    )

    webhook_kept_seconds: float = Field(
        30 * 24 * 3600.0,
        ge=0,
        description="How long a delivery is kept in the database once it has finished.",
    )
    secret_key: SecretStr = Field(
        SecretStr(""),
        description="Seals the signing secrets of webhooks in the database, for API, workers and bootstrap: "
        "base64 of 32 bytes. Keys after a comma only open what was sealed before.",
    )

    metrics_token: SecretStr = Field(
        SecretStr(""),
        description="A bearer token that reads GET /metrics of the API; an admin key does too.",
    )
    worker_metrics_address: str = Field(
        "", description="HOST:PORT on which a worker answers GET /metrics, without a key; empty: nowhere."
    )

    wandb_api_key: SecretStr = Field(
        SecretStr(""), description="Lets jobs name wandb among their integrations; for API and workers."
    )
    wandb_entity: str = Field(
        "", description="The entity (team or user) that all jobs' runs go to; empty: the key's own."
    )
    wandb_base_url: str = Field("", description="A Weights & Biases server of one's own; empty: theirs.")
    mlflow_tracking_uri: str = Field(
        "", description="Lets jobs name mlflow among their integrations; for API and workers."
    )
    tensorboard_dir: str = Field(
        "",
        description="Folder of TensorBoard's event files; lets jobs name tensorboard; for API and workers.",
    )

    organization: str = Field("personal", description="Slug of the first organization, part of model names.")
    bootstrap_api_key: SecretStr = Field(
        SecretStr(""), description="First admin key, registered at start when it is not known yet."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info")

    @property
    def inference_urls(self) -> list[str]:
        """Where inference servers listen, each once."""
        found = (url.strip().rstrip("/") for url in self.inference_url.split(","))
        return list(dict.fromkeys(url for url in found if url))
