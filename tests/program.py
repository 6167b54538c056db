"""The command line, and other programs, in processes forked from one that has imported what they need.

A launch spends ten seconds on imports; such a process starts in milliseconds. What it is forked from has one thread.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from scavenger import training
from scavenger.__main__ import main


# Everything that a run imports.
PRELOADED = [
    *("pytest", "datasets", "deepspeed", "torch.utils.tensorboard", "transformers.models.auto.modeling_auto"),
    *(f"scavenger.{name}" for name in ("hub", "plan", "recurrence.recurrence", "report.report", "run.processes")),
    *(f"scavenger.transfer.{name}" for name in ("baseline", "transfer")),
]
HANGS = 600  # seconds without end, on a machine however busy
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000  # linux/sched.h


def forked(target, *arguments):
    """A process that has begun with `target(*arguments)`, a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def ranks(count):
    """The environment variables of each process of one launch on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


class Program:
    """The command line in a process of its own; its output, and what its training reads, in files below `folder`."""

    def __init__(
        self, folder: Path, recipe: Path, *overrides, run=None, disk=None, hold=None, environment=None, script=None
    ):
        """`hold` stops it at a step (" logits 9") or before an operation on a path ("os.mkdir /data.partial").

        Operations are Python's audit events: os.mkdir, open, os.rename (by its destination). `script` is a program
        that calls the command line, in place of `scavenger` itself.
        """
        folder.mkdir(exist_ok=True)
        self.run, self.seen, self._err = run or folder / "run", folder / "seen", folder / "err"
        self._err.unlink(missing_ok=True)
        self.began = time.time_ns()
        words = [str(recipe), f"run_dir={self.run}", *overrides]
        self.process = forked(_program, words, folder, disk, hold, environment or {}, script)
        if hold is not None:
            self.until(lambda: self._state == "T")

    def until(self, condition):
        """Wait for something that the program does; returns what the condition found."""
        deadline = time.monotonic() + HANGS
        while not (found := condition()):
            assert self.process.exitcode is None, f"ended before, with {self.process.exitcode}: {self.err}"
            assert time.monotonic() < deadline
            time.sleep(2e-4)
        return found

    def until_step(self, stage, step):
        """Wait until a step has its text, hence begins, or has begun in a process before this one."""
        self.until(lambda: (stage, step) in [(name, n) for name, n, _ in self.batches])

    def end(self, number=None):
        """Let it go on, with a signal if there is one; returns the exit code."""
        for each in (number, signal.SIGCONT):
            if each is not None and self.process.exitcode is None:
                os.kill(self.process.pid, each)
        self.process.join(HANGS)
        return self.process.exitcode

    @property
    def _state(self):
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0]

    @property
    def err(self):
        return self._err.read_text()

    @property
    def lines(self):
        """What it says itself, without the bars of progress."""
        return re.findall(r"scavenger: .*", self.err)

    @property
    def batches(self):
        """(stage, step, rows) of every step that was begun, by this process or those before it in the folder."""
        lines = self.seen.read_text().split("\n")[:-1] if self.seen.exists() else []
        return [tuple(json.loads(line)) for line in lines]


@contextlib.contextmanager
def small_disk(folder):
    """A disk of 4 MiB at `folder`, seen only by a process that holds it, whose number is given."""
    folder.mkdir()
    reading, writing = multiprocessing.Pipe(duplex=False)
    holder = forked(_hold, folder, writing)
    writing.close()
    try:
        if refused := reading.recv():
            pytest.skip(f"no disk of one's own on this machine ({refused})")
        yield holder.pid
    finally:
        holder.kill()
        holder.join()


def _program(words, folder, disk, hold, environment, script):
    os.environ.update({"TORCH_COMPILE_DISABLE": "1"} | environment)  # a report would compile for seconds a shape
    runpy.run_path(str(ROOT / "tests/launching/sitecustomize.py"))
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if disk is not None:
        for space, kind in (("user", CLONE_NEWUSER), ("mnt", CLONE_NEWNS)):
            _called("setns", os.open(f"/proc/{disk}/ns/{space}", os.O_RDONLY), kind)
    gc.freeze()  # what it was forked with is not looked through again
    os.sched_getaffinity = lambda process: {0}  # one thread, as tests share their cores
    train = training.train
    operation, _, place = (hold or "").partition(" ")

    def stop():
        os.kill(os.getpid(), signal.SIGSTOP)

    def recorded(run, optimisation):
        seen = os.open(folder / "seen", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def noted(step):
            found = optimisation.batch(step)
            os.write(seen, (json.dumps([optimisation.name, step, found.rows.tolist()]) + "\n").encode())
            if hold == f" {optimisation.name} {step}":
                stop()
            return found

        return train(run, dataclasses.replace(optimisation, batch=noted))

    def watch(event, given):
        if event == operation and str(given[event == "os.rename"]).endswith(place):
            stop()

    training.train = recorded
    sys.addaudithook(watch)
    sys.argv = [script or "scavenger", *words]
    if script is not None:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    sys.exit(main())


def _hold(folder, writing):
    user, group = os.getuid(), os.getgid()
    try:
        _called("unshare", CLONE_NEWUSER | CLONE_NEWNS)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
        _called("mount", b"none", os.fsencode(folder), b"tmpfs", 0, b"size=4m")
    except OSError as error:
        writing.send(str(error))
        return
    writing.send(None)
    signal.pause()


def _called(name, *arguments):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
