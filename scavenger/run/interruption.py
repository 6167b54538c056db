"""SIGTERM, a scheduler's warning: a training first writes a checkpoint, any other stage ends at once.

Other stages need no such warning: they write to a temporary folder and rename it when it is complete.
"""

import contextlib
import os
import signal
import threading


EXIT_CODE = os.EX_TEMPFAIL  # 75 of sysexits.h: not done; run the same command again


class Stopped(BaseException):
    """A SIGTERM ends the run. A BaseException, so that no `except Exception` swallows it."""


class Postponed:
    """Whether a SIGTERM arrived inside `postponed()`."""

    asked = False


_postponed: Postponed | None = None


@contextlib.contextmanager
def handled():
    """Within the context a SIGTERM raises Stopped; only for the main thread of our own program, never on import."""
    if threading.current_thread() is not threading.main_thread():  # Python tells no other of a signal
        yield
        return
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def postponed():
    """Within the context a SIGTERM only sets `.asked` of the yielded object, which a training checks after each step.

    If nobody checked it, Stopped is raised when the context ends.
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
