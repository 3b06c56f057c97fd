"""Commands of `luthier` by noun, and what they print. Imports that only one command needs are inside it."""
