"""Bounds proven for every program at once, by triton-viz' symbolic sanitizer, for the kernels that it understands.

It can't express `tl.split` (qk_norm_rope), loop bounds chosen by a program's place (attention with excluded keys) and
pointers from loaded indices (region experts); of those, and of all others, `test_kernels` checks every access at odd
sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Not imported here: it raises the interpreter's recursion limit beyond what C's stack bears.
pytestmark = pytest.mark.skipif(find_spec("triton_viz") is None, reason="triton-viz comes for x86-64 Linux alone")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.sanitizer"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)) | {"errors": done.stderr}


def test_no_program_leaves_its_tensors(told: dict[str, Any]) -> None:
    assert {name for name, _, _ in told["whole"]} == {
        *("norm_modulate", "residual_norm_modulate", "residual"),
        *("gate_mix", "gate_mix_mean", "joint_attention"),
    }
    assert [call for call in told["whole"] if call[2] != 0] == [], told["errors"]


def test_missing_masks_are_caught(told: dict[str, Any]) -> None:
    assert len(told["faults"]) == 4
    assert [fault for fault in told["faults"] if fault[2] != 1] == [], told["errors"]
