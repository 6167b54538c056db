"""Filters reduced by worker processes, each in one thread: a search is many small steps, which gain from no other."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch

from scavenger.recipe import RecipeError
from scavenger.recurrence.reduction.reduced import ReducedFilter


# Taps to reduce, of all filters to all aims, from which on workers are started: they take two seconds to start, in
# which one core reduces 20,000 (irka) to 70,000 (balanced) of them.
WORKERS_PAY = 1 << 17
Map = Callable[..., Iterator]  # of the builtin's kind


def available() -> int:
    """Workers for this process: the cores that it may use, shared with the other processes of a launch on this host."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def started(count: int) -> Iterator[Map]:
    """A `map` that shares calls out over `count` processes, in order; with one, the builtin.

    Workers are forked from a process that has imported this module and nothing of the caller: no CUDA, no threads, no
    main script. They end with the context, and with a caller that is killed. RecipeError where one of them is killed.
    """
    if count == 1:
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)
    try:
        with _no_main_script():
            yield pool.map
    except BrokenProcessPool as error:
        raise RecipeError(
            f"recurrence: one of {count} processes that reduce filters was ended; expected enough memory for them; "
            "layers that are complete are kept: run the same command again to resume"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def reduce(method: str, taps: np.ndarray, aim: dict, max_state_size: int) -> list[ReducedFilter]:
    """The reductions of a group of filters, `taps` (filter, length), by a method's name, to one aim."""
    module = importlib.import_module(f"scavenger.recurrence.reduction.{method}")
    return module.reduce(torch.from_numpy(taps), **aim, max_state_size=max_state_size)


@contextlib.contextmanager
def _no_main_script():
    """Each worker would import the script that is running."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _begin():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it goes to all processes of a terminal; the caller ends the workers
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller():
    multiprocessing.parent_process().join()
    os._exit(1)
