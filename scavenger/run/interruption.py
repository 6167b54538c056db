"""SIGTERM, a scheduler's warning: training first writes a checkpoint, anything else ends at once.

What is not training loses nothing: it writes beside and renames.
"""

import contextlib
import os
import signal
import threading


EXIT_CODE = os.EX_TEMPFAIL  # 75 of sysexits.h: not done, the same command is worth giving again


class Stopped(BaseException):
    """A SIGTERM ends the run; no Exception, so that nothing takes it for an error of its own."""


class Postponed:
    """Within `postponed()`: whether a SIGTERM came."""

    asked = False


_postponed: Postponed | None = None


@contextlib.contextmanager
def handled():
    """Within the context a SIGTERM raises Stopped; for the main thread of a program of ours, never on import."""
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
    """Within the context a SIGTERM only sets `.asked` of what it yields, for whoever trains to look at after a step.

    One that nobody looked at raises Stopped where the context ends.
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
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: launchers and schedulers both send it
    raise Stopped
