"""PyTorch's flags of float32's precision. This module imports little, so that a new process for them starts fast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from mogle_rt.torch_api.settings import settled

BACKENDS: Any = torch.backends
FLAGS: dict[str, Callable[[], Any]] = {
    "products": torch.get_float32_matmul_precision,
    "cuda.matmul.allow_tf32": lambda: BACKENDS.cuda.matmul.allow_tf32,
    "cudnn.allow_tf32": lambda: BACKENDS.cudnn.allow_tf32,
    "all": lambda: BACKENDS.fp32_precision,
    "cuda.matmul": lambda: BACKENDS.cuda.matmul.fp32_precision,
    "cudnn": lambda: BACKENDS.cudnn.fp32_precision,
    "cudnn.conv": lambda: BACKENDS.cudnn.conv.fp32_precision,
    "cudnn.rnn": lambda: BACKENDS.cudnn.rnn.fp32_precision,
    "mkldnn": lambda: BACKENDS.mkldnn.fp32_precision,
    "mkldnn.matmul": lambda: BACKENDS.mkldnn.matmul.fp32_precision,
    "mkldnn.conv": lambda: BACKENDS.mkldnn.conv.fp32_precision,
}


def flags() -> dict[str, Any]:
    """Every flag of float32's precision. A flag that can't be read counts as "mixed"."""
    found = {}
    for name, read in FLAGS.items():
        try:
            found[name] = read()
        except RuntimeError:  # PyTorch's older and newer flags disagree
            found[name] = "mixed"
    return found


def check_flags() -> None:
    names = ("cuda.matmul", "cudnn.conv", "mkldnn.matmul", "mkldnn.conv")
    before = flags()
    for allowed in (False, True):
        with contextlib.suppress(KeyError), settled(allow_tf32=allowed):
            now = flags()
            assert [now[n] for n in names] == ["tf32" if allowed else "ieee"] * 2 + ["ieee"] * 2, now
            with settled(allow_tf32=not allowed):  # the outermost decides
                assert flags() == now
            raise KeyError
        assert flags() == before
