"""triton-viz' symbolic sanitizer proves for all programs at once that kernels stay within their tensors.

It can't express `tl.split` (qk_norm_rope), loop bounds that depend on the program's number (attention with excluded
keys), and pointers from loaded indices (region experts). For these kernels, and for all others too, `test_kernels`
checks every access at odd sizes.
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

# triton-viz isn't imported here, since it raises Python's recursion limit beyond what C's stack can take.
pytestmark = pytest.mark.skipif(find_spec("triton_viz") is None, reason="triton-viz is there for x86-64 Linux only")


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
