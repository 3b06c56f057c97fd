"""The fixtures of the integration tests."""

from tests.integration.conftest import client, context, jobs

__all__ = ["client", "context", "jobs"]
