"""Identifiers. Every id has a prefix by kind; the rest is a UUIDv7, so ids of one kind sort by creation."""

import secrets
from typing import Literal

import uuid_utils

IdKind = Literal[
    "organization",
    "project",
    "api_key",
    "file",
    "upload",
    "upload_part",
    "job",
    "event",
    "checkpoint",
    "model",
    "alias",
    "alias_version",
    "attempt",
    "webhook_endpoint",
    "webhook_delivery",
    "webhook_event",
    "permission",
    "chat_completion",
    "completion",
    "response",
    "response_message",
    "response_call",
    "request",
]

PREFIXES: dict[IdKind, str] = {
    "organization": "org-",
    "project": "proj_",
    "api_key": "key_",
    "file": "file-",
    "upload": "upload_",
    "upload_part": "part_",
    "job": "ftjob-",
    "event": "ftevent-",
    "checkpoint": "ftckpt_",
    "model": "model-",
    "alias": "alias_",
    "alias_version": "aliasver_",
    "attempt": "attempt-",
    "webhook_endpoint": "we_",
    "webhook_delivery": "wh_",
    "webhook_event": "evt_",
    "permission": "cp_",
    "chat_completion": "chatcmpl-",
    "completion": "cmpl-",
    "response": "resp_",
    "response_message": "msg_",
    "response_call": "fc_",
    "request": "req_",
}

_NAME_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


def new_id(kind: IdKind) -> str:
    """Return a fresh id such as `ftjob-0198…`; never reused, sortable by creation time."""
    return PREFIXES[kind] + uuid_utils.uuid7().hex


def new_model_suffix() -> str:
    """Return the 8 random lower-case alphanumerics that end a tuned model's name."""
    return "".join(secrets.choice(_NAME_ALPHABET) for _ in range(8))
