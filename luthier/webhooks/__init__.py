"""Webhooks: events, signatures, permitted targets, sending, and retries."""
