"""Records the files in whose functions a server runs. Python imports it at start, from PYTHONPATH.

For each file `take-N` that appears in $CALLED_FILES_DIR, the files since the last one are written to `N-PID`.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

_FOLDER = Path(os.environ["CALLED_FILES_DIR"])
_SERVERS = (["-m", "api"], ["-m", "luthier.inference.server"])
_called: set[str] = set()


def _on_event(frame: FrameType, event: str, _argument: object) -> None:
    if event == "call":
        _called.add(frame.f_code.co_filename)


def _answer() -> None:
    number = 0
    while True:
        while not (_FOLDER / f"take-{number}").exists():
            time.sleep(0.02)
        if number == 0:
            # The main thread imports torch at start, which is slow under a profiler.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        unfinished = _FOLDER / f"{number}-{os.getpid()}-unfinished"
        unfinished.write_text("\n".join(list(_called)))
        _called.clear()
        unfinished.rename(_FOLDER / f"{number}-{os.getpid()}")
        number += 1


if sys.orig_argv[1:3] in _SERVERS:
    signal.signal(signal.SIGUSR1, lambda *_: sys.setprofile(_on_event))
    threading.Thread(target=_answer, daemon=True).start()
    threading.setprofile(_on_event)
