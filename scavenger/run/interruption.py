"""SIGTERM, a scheduler's warning: training writes a checkpoint before it stops, every other stage stops at once.

Other stages lose no data: they write to a temporary folder and rename it when it is complete.
"""

import contextlib
import os
import signal
import threading


EXIT_CODE = os.EX_TEMPFAIL  # 75 in sysexits.h: temporary failure, run the command again


class Stopped(BaseException):
    """A SIGTERM stops the run; derived from BaseException, so that `except Exception` does not catch it."""


class Postponed:
    """Whether a SIGTERM arrived inside `postponed()`."""

    asked = False


_postponed: Postponed | None = None


@contextlib.contextmanager
def handled():
    """Inside the context a SIGTERM raises Stopped; for the main thread of scavenger's own commands, never on import."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set signal handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def postponed():
    """Inside the context a SIGTERM only sets `.asked` of the yielded object; the training loop checks it after a step.

    If it is set when the context ends without an exception, Stopped is raised there.
    """
    global _postponed
    _postponed = Postponed()
    try:
        yield _postponed
        asked = _postponed.asked
    finally:
        _postponed = None
    if asked:
        raise Stopped


def _ended(number, frame):
    if _postponed is not None:
        _postponed.asked = True
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ignore repeats: launchers and schedulers both send it
    raise Stopped
