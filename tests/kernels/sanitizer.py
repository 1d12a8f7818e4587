"""``python -m tests.kernels.sanitizer``: run kernels, as they are and with planted faults, under triton-viz' sanitizer.

The results are printed as JSON. The sanitizer changes the interpreter for good, and ends its process where it finds a
fault. So each run has a process of its own, forked from this one, whose exit code says what came of it: 0 within bounds,
1 a violation, 2 anything else.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_viz
from triton_viz.clients import Sanitizer
from triton_viz.core import patch

from mogle_rt.kernels import gate, gate_mix, joint_attention, stream_rows, stream_rows_kernel
from tests.kernels.cases import BY_NAME, planted

KERNELS = {  # module that launches, module of the source, kernels
    "norm_modulate": (stream_rows, stream_rows_kernel, ["stream_rows_kernel"]),
    "residual_norm_modulate": (stream_rows, stream_rows_kernel, ["stream_rows_kernel"]),
    "residual": (stream_rows, stream_rows_kernel, ["stream_rows_kernel"]),
    "gate_mix": (gate_mix, gate_mix, ["_gate_mix_kernel"]),
    "gate_mix_mean": (gate_mix, gate_mix, ["_gate_mix_kernel", "_mean_mix_kernel"]),
    "joint_attention": (joint_attention, joint_attention, ["_joint_attention_kernel"]),
}
FAULTS = [
    ("norm_modulate", "live = r < rows", "live = r < rows + 1"),
    ("residual", "(cols < D)[None, :]", "(cols < D + 9)[None, :]"),
    ("gate_mix", "live = n < tokens", "live = n >= 0"),
    ("joint_attention", "key_live = key < stop", "key_live = key < stop + 1"),
]


def calls() -> list[tuple[str, dict[str, Any]]]:
    """Kernels and sizes. Of attention only the calls that the sanitizer can express, with q, k and v in separate rows."""
    found = [(name, sizes) for name in KERNELS for sizes in BY_NAME[name].small if name != "joint_attention"]
    attention = [s for s in BY_NAME["joint_attention"].small if s["visibility"] in ("scaled", "joint")]
    return found + [("joint_attention", sizes | {"fused": False, "extra": 0}) for sizes in attention]


def run(name: str, sizes: dict[str, Any], fault: tuple[str, str] | None) -> None:
    """Call a kernel once under the sanitizer."""
    module, written_in, kernels = KERNELS[name]
    # It follows loops in a kernel's own module. To follow those in the helpers' modules, these need its hook, too.
    for helpers in (gate, stream_rows_kernel):
        helpers._triton_viz_loop_patcher = patch._loop_patcher  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        source = planted(written_in, *fault, Path(folder), monkeypatch) if fault else written_in
        for kernel in kernels:
            traced = triton_viz.trace(client=Sanitizer(abort_on_error=True))(getattr(source, kernel))
            monkeypatch.setattr(module, kernel, traced)
        case = BY_NAME[name]
        case.run(**case.arguments(7, torch.float32, **sizes))


def forked(name: str, sizes: dict[str, Any], fault: tuple[str, str] | None = None) -> int:
    """Run in a forked process, and return its exit code."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run(name, sizes, fault)
            code = 0
        except SystemExit:
            code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Run everything, and print the exit codes."""
    torch.set_num_threads(1)
    whole = [(name, sizes, forked(name, sizes)) for name, sizes in calls()]
    faults = [(name, new, forked(name, calls_of(name), (old, new))) for name, old, new in FAULTS]
    json.dump({"whole": whole, "faults": faults}, sys.stdout)


def calls_of(name: str) -> dict[str, Any]:
    """The first sizes of a kernel's case."""
    return next(sizes for kernel, sizes in calls() if kernel == name)


if __name__ == "__main__":
    main()
