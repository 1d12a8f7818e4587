"""Fake CUDA tensors on a machine without CUDA: what a step would do on a GPU, told operation by operation.

PyTorch's fake tensors carry shapes, dtypes and devices, no values. So whatever would wait for a value (`.item()`, a
branch on a tensor, a shape that depends on data) fails on them, as it fails in the capture of a CUDA graph; copies
between devices don't, and are looked for here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
COPIES = {ATEN.to, ATEN._to_copy, ATEN.copy_, ATEN.copy}  # in inference mode `to` comes whole

# c10's headers alone: torch/extension.h would take the compiler most of a minute.
GUARD = r"""
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
struct Install {
  Install() {
    auto& slot = c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
    if (slot.load() == nullptr) slot.store(&guard);
  }
} install;
}
"""


def compile_guard(path: Path) -> None:
    """Write a library that registers PyTorch's own no-op device guard for CUDA, which its CPU builds leave out."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("compiling PyTorch's no-op CUDA guard needs a C++ compiler (c++, or the one named by CXX)")
    torch_folder = Path(torch.__file__).parent
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    source = path.with_suffix(".cpp")
    source.write_text(GUARD)
    library = ["-o", str(path), f"-L{torch_folder / 'lib'}", "-lc10"]
    subprocess.run([compiler, *options, str(source), *library], check=True)


def install_guard(path: Path) -> None:
    """Load what `compile_guard` wrote; needed before `fake_mode` where PyTorch is built without CUDA."""
    torch.ops.load_library(str(path))


@dataclass
class Trace(TorchDispatchMode):
    """Notes every operation under it; refuses those between devices.

    Attributes:
        operations: name, and shapes and dtypes of what came out.
    """

    operations: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions about a tensor
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        # A CPU scalar is an argument of the launch, unless a copy is what is asked for.
        copies = func.overloadpacket in COPIES
        devices = {t.device.type for t in tensors if copies or t.dim() or t.device.type != "cpu"}
        if len(devices) > 1 or (devices and devices != {"cuda"}):
            raise AssertionError(f"{func} works on {sorted(devices)}: a copy between host and device")
        made = tuple((tuple(t.shape), t.dtype) for t in tree_leaves(out) if isinstance(t, Tensor))
        self.operations.append((str(func), made))
        return out


CARD = (9, 0)  # the compute capability of the card that a machine without one is taken to have
real_capability = torch.cuda.get_device_capability


@contextmanager
def fake_mode() -> Iterator[None]:
    """Fake tensors of every device, "cuda" included; a test may say of which capability the card is."""
    unsaid = torch.cuda.get_device_capability is real_capability and not torch.cuda.is_available()
    card = mock.patch.object(torch.cuda, "get_device_capability", return_value=CARD) if unsaid else nullcontext()
    with card, FakeTensorMode(allow_non_fake_inputs=False):
        yield


def trace(step: Callable[[], object]) -> list[tuple[str, tuple[Any, ...]]]:
    """The operations of a step.

    Raises:
        AssertionError: it copies between devices.
        Exception: PyTorch's own, where it would wait for the device.
    """
    with Trace() as noted:
        step()
    return noted.operations
