"""Answers that are streamed: chat through the inference server, job events, byte ranges of files."""
