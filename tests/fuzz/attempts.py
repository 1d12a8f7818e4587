"""Many attempts to break a reader, in processes of their own: how they end, and how much time and memory they take."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import resource
import select
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from mogle_rt import MogleError

SECONDS = 10  # of processor time, for an attempt
WAIT = 120  # seconds by the clock, in which an attempt must end on a busy machine
MEMORY = 1 << 30  # bytes of address space beyond what the process had before
LONGEST_LINE = 1600

WORKS, REFUSED = "works", "refused"


@dataclass
class Report:
    """How attempts ended: how many in each way, the largest time and memory of one, and all defects."""

    outcomes: Counter[str] = field(default_factory=Counter)
    defects: list[tuple[int, str]] = field(default_factory=list)
    longest: float = 0.0


def attempt_many(name: str, attempt: Callable[[random.Random], object], seed: int, numbers: range) -> Report:
    """Make attempts, each with a random generator that is seeded with the seed and the attempt's number.

    An attempt may return, or raise a `MogleError` whose message is one line of printable characters. Everything else is
    a defect: another error, a signal, more time or memory than it may take.
    """
    report, at = Report(), numbers.start
    while at < numbers.stop:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            try:
                _attempts(name, attempt, seed, range(at, numbers.stop), writing)
            finally:
                os._exit(0)
        os.close(writing)
        at = _follow(child, reading, report, at)
    return report


def _follow(child: int, reading: int, report: Report, at: int) -> int:
    """Read a process's reports of its attempts until it ends. Returns the number of the next attempt."""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        rest = b""
        while True:
            ready, _, _ = select.select([pipe], [], [], WAIT)
            data = pipe.read(1 << 16) if ready else b""
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                number, outcome, seconds, detail = json.loads(line)
                report.outcomes[outcome] += 1
                report.longest = max(report.longest, seconds)
                if outcome not in (WORKS, REFUSED):
                    report.defects.append((number, f"{outcome}: {detail}"))
                at = number + 1
        if not ready:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        kind = f"signal {os.WTERMSIG(status)}" if ready else "hangs"
        report.outcomes[kind] += 1
        report.defects.append((at, kind))
        at += 1
    return at


def _attempts(name: str, attempt: Callable[[random.Random], object], seed: int, numbers: range, writing: int) -> None:
    faulthandler.disable()  # the report names a signal in a line, where pytest's handler would print all stacks
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    warnings.simplefilter("ignore")
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        # A process that computes for too long gets a signal that no attempt can catch.
        spent = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + 2 * SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        begin = time.process_time()
        outcome, detail = _outcome(lambda n=number: attempt(random.Random(f"{seed}/{name}/{n}")))  # type: ignore[misc]
        seconds = time.process_time() - begin
        if seconds > SECONDS:
            outcome, detail = "too slow", f"{seconds:.1f} s"
        os.write(writing, json.dumps([number, outcome, seconds, detail]).encode() + b"\n")
        if number % 50 == 0:
            gc.collect()


def _outcome(attempt: Callable[[], object]) -> tuple[str, str]:
    try:
        attempt()
    except MogleError as error:
        line = str(error)
        if not line.isprintable() or not line or len(line) > LONGEST_LINE:
            return "not one line", repr(line[:300])
        return REFUSED, ""
    except BaseException as error:
        trace, where = error.__traceback__, []
        while trace is not None:
            where.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
            trace = trace.tb_next
        return type(error).__name__, f"{str(error)[:200]!r} at {' '.join(where[-6:])}"
    return WORKS, ""


if sys.platform != "linux":  # pragma: no cover
    raise ImportError("attempts are made in forks with limits, as Linux has them")
