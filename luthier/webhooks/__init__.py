"""Telling a client's receiver that a job has ended: what is sent, signed how, where to, and when again."""
