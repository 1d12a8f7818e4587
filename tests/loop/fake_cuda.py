"""Fake CUDA tensors on a machine without CUDA show, operation by operation, what a step would do on a GPU.

PyTorch's fake tensors have shapes, dtypes and devices, but no values. Whatever would wait for a value (`.item()`, a
branch on a tensor, a shape that depends on data) fails on them, as it fails in the capture of a CUDA graph. Copies
between devices don't fail on them, so `Trace` refuses these.
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
COPIES = {ATEN.to, ATEN._to_copy, ATEN.copy_, ATEN.copy}  # inference mode does not split `to` into `_to_copy`

# It includes only c10's headers, since the compiler takes most of a minute for torch/extension.h.
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
    """Compile a library that registers PyTorch's device guard without effect for CUDA. PyTorch's CPU builds lack it."""
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
    """Load the library that `compile_guard` wrote. `fake_mode` needs it where PyTorch is built without CUDA."""
    torch.ops.load_library(str(path))


@dataclass
class Trace(TorchDispatchMode):
    """Notes every operation within its block, and raises at those between devices.

    Attributes:
        operations: of each the name, and the shapes and dtypes of its results.
    """

    operations: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # these only ask for a tensor's properties
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        # A scalar on the CPU becomes an argument of the launch, unless the operation is a copy.
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
    """Make all tensors fake ones, on any device, "cuda" too. A test may set the card's compute capability, `CARD`."""
    unsaid = torch.cuda.get_device_capability is real_capability and not torch.cuda.is_available()
    card = mock.patch.object(torch.cuda, "get_device_capability", return_value=CARD) if unsaid else nullcontext()
    with card, FakeTensorMode(allow_non_fake_inputs=False):
        yield


def trace(step: Callable[[], object]) -> list[tuple[str, tuple[Any, ...]]]:
    """The operations of a step.

    Raises:
        AssertionError: the step copies between devices.
        Exception: PyTorch's own, where it would wait for the device.
    """
    with Trace() as noted:
        step()
    return noted.operations
