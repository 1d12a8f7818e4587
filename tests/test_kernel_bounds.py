"""Bounds proven for every program at once, by triton-viz' symbolic sanitizer, for the kernels that it understands.

It can't express `tl.split` (qk_norm_rope), loop bounds chosen by a program's place (attention with excluded keys) and
pointers from loaded indices (region experts); of those, `test_kernels` checks every access at odd sizes instead.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mogle_rt.kernels import gate, gate_mix, gate_mix_embed, joint_attention, stream_rows
from tests.kernel_cases import BY_NAME
from tests.test_kernel_faults import planted
from tests.test_kernels import in_the_interpreter

triton_viz = pytest.importorskip("triton_viz", reason="triton-viz comes for x86-64 Linux alone")
pytestmark = in_the_interpreter

KERNELS = {
    "norm_modulate": (stream_rows, ["_stream_rows_kernel"]),
    "residual_norm_modulate": (stream_rows, ["_stream_rows_kernel"]),
    "residual": (stream_rows, ["_stream_rows_kernel"]),
    "gate_mix": (gate_mix, ["_gate_mix_kernel"]),
    "gate_mix_mean": (gate_mix, ["_gate_mix_kernel", "_mean_mix_kernel"]),
    "gate_mix_embed": (gate_mix_embed, ["_gate_mix_embed_kernel"]),
    "joint_attention": (joint_attention, ["_joint_attention_kernel"]),
}
CALLS = [(name, sizes) for name in KERNELS for sizes in BY_NAME[name].small if name != "joint_attention"] + [
    # Rows of one tensor each: of interleaved views it takes the gaps for the end.
    ("joint_attention", sizes | {"fused": False, "extra": 0})
    for sizes in BY_NAME["joint_attention"].small
    if sizes["visibility"] in ("scaled", "joint")
]


@pytest.fixture
def _loops_of_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sanitizer follows the loops of a kernel's own module; those of its helpers' module need its hook, too."""
    from triton_viz.core import patch

    monkeypatch.setattr(gate, "_triton_viz_loop_patcher", patch._loop_patcher, raising=False)


def sanitize(module: Any, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run these kernels under the sanitizer, which ends the process (SystemExit) where it finds a fault."""
    from triton_viz.clients import Sanitizer

    for name in names:
        traced = triton_viz.trace(client=Sanitizer(abort_on_error=True))(getattr(module, name))
        monkeypatch.setattr(module, name, traced)


@pytest.mark.usefixtures("_loops_of_helpers")
@pytest.mark.parametrize(
    ("name", "sizes"), CALLS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_no_program_leaves_its_tensors(name: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sanitize(*KERNELS[name], monkeypatch)
    case = BY_NAME[name]
    case.run(**case.arguments(7, torch.float32, **sizes))


@pytest.mark.usefixtures("_loops_of_helpers")
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("norm_modulate", "live = r < rows", "live = r < rows + 1"),
        ("residual", "(cols < D)[None, :]", "(cols < D + 9)[None, :]"),
        ("gate_mix", "live = n < tokens", "live = n >= 0"),
        ("joint_attention", "key_live = key < stop", "key_live = key < stop + 1"),
    ],
)
def test_a_missing_mask_is_caught(
    name: str, old: str, new: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module, kernels = KERNELS[name]
    faulty = planted(module, old, new, tmp_path, monkeypatch)
    for kernel in kernels:
        monkeypatch.setattr(module, kernel, getattr(faulty, kernel))
    sanitize(module, kernels, monkeypatch)
    case = BY_NAME[name]
    sizes = {"fused": False, "extra": 0} if name == "joint_attention" else {}
    with pytest.raises(SystemExit):
        case.run(**case.arguments(7, torch.float32, **case.small[0] | sizes))
    assert "ILLEGAL MEMORY ACCESS" in capfd.readouterr().out
