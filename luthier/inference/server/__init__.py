"""The inference server's process: HTTP, server-sent events, status."""
