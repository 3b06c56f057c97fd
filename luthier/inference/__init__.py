"""The inference server: scheduler, adapters, runner, sampler, and the HTTP clients of it."""
