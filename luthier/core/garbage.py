"""Python's collector of cyclic garbage, in processes that answer many at a time."""

import gc


def freeze_garbage() -> None:
    """Let the collector look at nothing of what is there now, for good.

    Modules and what they made at their import are some hundred thousand objects. Each full collection goes
    through all of them with the interpreter held, and every stream stands still for so long. What is in a
    cycle now will never be freed by the collector: call it before anything is there that is to leave again.
    """
    gc.collect()
    gc.freeze()
