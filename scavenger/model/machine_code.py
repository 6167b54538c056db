"""C++ that is compiled when it is first used, by the machine's own compiler, into the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path


logger = logging.getLogger(__name__)

FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]


@functools.cache
def library(name: str, source: str) -> ctypes.CDLL | None:
    """The source as a library; None where it cannot be compiled."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return None
    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), platform.processor())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256("\n".join([source, *FLAGS, cpu, version]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scavenger"
    built = folder / f"{name}-{digest}.so"
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                written, made = Path(scratch) / f"{name}.cpp", Path(scratch) / f"{name}.so"
                written.write_text(source)
                subprocess.run([compiler, *FLAGS, written, "-o", made], check=True, capture_output=True)
                made.replace(built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning(f"{compiler} did not compile {name}, which stays in torch: {error}")
        return None


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
