"""Tables, queries, sessions and migrations."""
