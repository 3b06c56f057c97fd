"""Models: what a public name resolves to, and which models a project may call."""
