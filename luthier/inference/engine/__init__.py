"""The engine: schedule, execute, sample, deliver. Never HTTP, files, or how a model computes."""
