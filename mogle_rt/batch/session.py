"""Ray, for as long as a job takes: started on this machine, or found as a cluster. It stays quiet and tells nobody."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import site
import tempfile
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mogle_rt.batch.quiet import without_rays_messages
from mogle_rt.bundle.leftovers import hold
from mogle_rt.errors import ClusterError, ConfigError
from mogle_rt.installed import install_command

NEEDED = {"ray": "ray", "pyarrow": "pyarrow"}  # modules by the names of their packages
OBJECT_STORE = 128 << 20  # bytes; only rows go through it, no images
LONGEST_FOLDER = 40  # characters; the names of sockets in it may have 107 in all
PREFIX = "mogle-rt-ray-"
LOCK = "lock"
# What is set for Ray on this machine, where the user hasn't set it: it reports nothing to its makers, and says nothing
# that only its own developers can use.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

# Ray's processes on this machine listen to this machine only. Ray reads it when it is imported: it comes too late in a
# program that has done so already.
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def check_installed() -> None:
    """Check that Ray is there, without importing it.

    Raises:
        ConfigError: it isn't.
    """
    missing = [name for name, module in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"batch needs {' and '.join(missing)}: {install_command('batch')}")


@contextlib.contextmanager
def ray_session(address: str | None, num_cpus: int) -> Iterator[Any]:
    """Ray's module, connected. What was started or set for it is gone afterwards.

    If the program has connected Ray itself, that is used, and stays.

    Args:
        address: of a cluster, as "10.0.0.1:6379"; "auto" finds the one that this machine belongs to. None starts Ray on
            this machine, reachable from nowhere else.
        num_cpus: places for workers, where Ray is started on this machine.

    Raises:
        ClusterError: there is no cluster, or Ray can't start.
    """
    with _environment(QUIET | ({} if address else LOCAL)), without_rays_messages():
        import ray

        if ray.is_initialized():
            yield ray
            return
        with _temporary_folder() as folder:
            options: dict[str, Any] = {"address": address}
            own: dict[str, str] = {}
            if address is None:
                options = {
                    "address": "local",
                    "num_cpus": num_cpus,
                    "include_dashboard": False,
                    "object_store_memory": OBJECT_STORE,
                    "_temp_dir": str(folder),
                }
                if not any(name.startswith("RAY_AUTH_") for name in os.environ):
                    own = {"RAY_AUTH_TOKEN": _token()}
            with _environment(own), _importable():
                try:
                    with _handlers_kept(), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
                except Exception as error:  # Ray raises many kinds
                    ray.shutdown()
                    what = "can't start on this machine" if address is None else f"can't reach a cluster at {address}"
                    raise ClusterError(f"Ray {what}: {one_line(error)}") from None
                try:
                    yield ray
                finally:
                    with _handlers_kept():
                        ray.shutdown()


def one_line(error: BaseException) -> str:
    """What an error of Ray says, without its traces of other processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:400]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, for Ray and its processes. Those that Ray sets itself go, too."""
    before = {name for name in os.environ if name.startswith("RAY_")}
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            if name not in before:
                del os.environ[name]


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Ray's processes on this machine import this package from where this process did, also out of a checkout."""
    place, before = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    if place not in site.getsitepackages():
        os.environ["PYTHONPATH"] = place if not before else f"{place}{os.pathsep}{before}"
    try:
        yield
    finally:
        if before is not None:
            os.environ["PYTHONPATH"] = before
        else:
            os.environ.pop("PYTHONPATH", None)


@cache
def _token() -> str:
    """What processes of Ray show each other, so that other users of this machine can't use it.

    Ray would write one into the home folder. It holds on to the first one that a process has.
    """
    return secrets.token_hex(32)


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray sets a handler of SIGTERM of its own; ours, which ends the program tidily, comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for all that Ray writes. Those of killed processes are removed, too."""
    place = Path(tempfile.gettempdir())
    if len(str(place)) > LONGEST_FOLDER:
        place = Path("/tmp")
    for old in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            _sweep(old)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    try:
        with (folder / LOCK).open("w") as lock:
            hold(lock.fileno(), folder / LOCK)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: what a killed process left stays
        return
    with (folder / LOCK).open("r") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its process lives
            return
        shutil.rmtree(folder, ignore_errors=True)
