"""``python -m mogle_rt.kernels`` shows what the compilers make of every kernel. It needs no GPU.

The launches of every kernel at FLUX.1-dev's sizes (512 x 512 pixels, one image) are recorded instead of being run. They
are then compiled for each GPU, and the first table shows the registers, spills, shared memory, stack and instructions of
the result. The second table compares two counts of bytes and FLOPs: the least that the work takes, with each byte moved
once, and what all programs together ask for. The latter is counted in Triton's interpreter (`requested`), unless
``--compile-only`` is given. ``--json`` prints both tables for other programs to read. The exit code is 1 if a kernel
spills or takes more shared memory than the GPU has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mogle_rt.kernels.aot import compile_all
from mogle_rt.kernels.chips import SHARED_LIMITS, TARGETS
from mogle_rt.kernels.workloads import DTYPES, variants, workloads

# NVIDIA H100 SXM by its datasheet: bytes a second, dense bf16 operations a second.
H100_BYTES, H100_FLOPS = 3.35e12, 989.4e12


def costs(dtype: str) -> list[dict[str, Any]]:
    """The declared cost of every workload, and the least time in µs that an H100 needs for it."""
    rows = []
    for work in [*workloads(DTYPES[dtype], "meta"), *variants(DTYPES[dtype])]:
        cost = work.declared()
        least = max(cost.moved / H100_BYTES, cost.flops / H100_FLOPS) * 1e6
        rows.append({"workload": work.name, "dtype": dtype, **dataclasses.asdict(cost), "h100_us": least})
    return rows


def _requested(kernels: Sequence[str], dtypes: Sequence[str]) -> subprocess.Popen[str]:
    """Start counting in a process of its own, because this process cannot both compile and interpret kernels."""
    base = {work.name for work in workloads(torch.bfloat16, "meta")}
    known = [kernel for kernel in kernels if kernel in base]  # the variants do the same work, or take too long to count
    command = [sys.executable, "-m", "mogle_rt.kernels.requested", "--dtype", *dtypes, "--kernel", *known]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def _with_requested(least: list[dict[str, Any]], process: subprocess.Popen[str]) -> None:
    """Wait for the count, and add it to the rows: ``requested_read``, ``requested_written``, ``requested_flops``.

    Raises:
        RuntimeError: counting failed; the process has printed the reason on stderr.
    """
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"counting what programs request failed with exit code {process.returncode}")
    found = {(r.pop("workload"), r.pop("dtype")): r for r in json.loads(output)}
    for row in least:
        asked = found.get((row["workload"], row["dtype"]), {})
        row |= {f"requested_{name}": value for name, value in asked.items()}


def _print(compiled: list[dict[str, Any]], least: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title="compiled", header_style="bold")
    for name in ("kernel", "launched by", "dtype", "GPU"):
        table.add_column(name)
    for name in ("registers", "spills", "shared", "of", "stack", "warps"):
        table.add_column(name, justify="right")
    table.add_column("matrix instructions")
    table.add_column("16-byte loads + stores", justify="right")
    table.add_column("2-byte", justify="right")
    for r in compiled:
        numbers = (r["registers"], r["spills"], r["shared"], SHARED_LIMITS[r["target"]], r["stack"], r["warps"])
        style = "" if _good(r) else "red"
        wide = f"{r['wide_loads']} + {r['wide_stores']}"
        names = (r["kernel"], r["workload"], r["dtype"], r["target"])
        table.add_row(
            *names, *map(str, numbers), r["tensor_cores"] or "none", wide, str(r["narrow_accesses"]), style=style
        )
    console.print(table)
    table = Table(
        title="the least work, with each byte moved once, and what all programs ask for (FLOPs of tl.dot only)",
        header_style="bold",
    )
    for name in ("call", "dtype"):
        table.add_column(name)
    for name in (
        "MB read",
        "asked",
        "MB written",
        "asked",
        "MFLOP",
        "asked",
        "launches",
        "FLOP per byte",
        "H100: least µs",
    ):
        table.add_column(name, justify="right")
    for r in least:
        amounts = [r.get(f"{asked}{name}") for name in ("read", "written", "flops") for asked in ("", "requested_")]
        pairs = ["-" if amount is None else f"{amount / 1e6:,.2f}" for amount in amounts]
        intensity = r["flops"] / (r["read"] + r["written"])
        values = (*pairs, str(r["launches"]), f"{intensity:,.2f}", f"{r['h100_us']:,.2f}")
        table.add_row(r["workload"], r["dtype"], *values)
    console.print(table)


def _good(r: dict[str, Any]) -> bool:
    return r["spills"] == 0 and r["shared"] <= SHARED_LIMITS[r["target"]]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    names = [w.name for w in workloads(torch.bfloat16, "meta")]
    parser = argparse.ArgumentParser(prog="python -m mogle_rt.kernels", description=(__doc__ or "").split("\n\n")[0])
    others = [w.name for w in variants(torch.bfloat16)]
    told = f"default: {', '.join(names)}; other calls of them: {', '.join(others)}"
    parser.add_argument("--kernel", choices=[*names, *others], nargs="+", default=names, metavar="CALL", help=told)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"], help="default: bf16")
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS), help="default: all")
    parser.add_argument("--compile-only", action="store_true", help="skip counting what programs ask for (minutes)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and Triton's interpreter can't compile kernels; unset it")
    process = None if given.compile_only else _requested(given.kernel, given.dtype)
    try:
        compiled = [
            {"workload": name, "dtype": dtype, **dataclasses.asdict(r)}
            | {read: getattr(r, read) for read in ("tensor_cores", "wide_loads", "wide_stores", "narrow_accesses")}
            for name, dtype, r in compile_all(given.kernel, given.dtype, given.target)
        ]
        least = [row for dtype in given.dtype for row in costs(dtype) if row["workload"] in given.kernel]
        if process is not None:
            _with_requested(least, process)
    finally:
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the whole group, so that its workers end as well
    if given.json:
        print(json.dumps({"compiled": compiled, "least": least}))
    else:
        _print(compiled, least)
    return 0 if all(map(_good, compiled)) else 1


if __name__ == "__main__":
    sys.exit(main())
