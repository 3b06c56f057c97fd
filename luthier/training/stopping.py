"""How work that TERM cut short says so."""


class StoppedError(Exception):
    """TERM came in the middle of something that can be done again after a resume."""
