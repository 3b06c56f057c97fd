"""The verbs: functions that take a session and never commit, never move bytes."""
