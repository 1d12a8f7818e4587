"""What the sources use of PyTorch though it may change. Each such name is called here, so that the name's own test fails
with a release of PyTorch that changes it. A private name in the sources that is not checked here fails as well.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mogle_rt
from mogle_rt.linear import onednn
from mogle_rt.torch_api import private
from tests.conftest import assert_close

pytestmark = pytest.mark.quick

ROOT = Path(mogle_rt.__file__).parents[1]
FOLDERS = ("mogle_rt", "kernels", "export")
SEVERAL = {"torch._subclasses.fake_tensor"}  # kernels/ imports nothing of mogle_rt, so it uses this name itself


def private_names(source: str) -> set[str]:
    """PyTorch's private names in a source: a part of the name begins with an underscore, or it is in torch.ops."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            if "._" in str(node.module):
                found.add(str(node.module))
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("aten."):
                name = f"torch.ops.{name}"
            if name.startswith("torch.") and any(
                p.startswith("_") and not p.startswith("__") for p in name.split(".")[1:]
            ):
                found.add(name)
            elif node.attr == "_cdata":
                found.add("_cdata")
        elif isinstance(node, ast.Constant) and node.value == "_reorder_linear_weight":
            found.add("torch.ops.mkldnn._reorder_linear_weight")
    return found


@functools.cache
def used() -> dict[str, list[str]]:
    """The private names in the sources, and the files that use each."""
    found: dict[str, list[str]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in private_names(path.read_text()):
                found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def qkv() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, length, 8, generator=g) for length in (5, 7, 7))


def fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not private.has_values(torch.empty(2))
    assert not private.has_values(torch.empty(2, device="meta"))
    assert private.has_values(torch.empty(2))


def storage_keys() -> None:
    x, y = torch.empty(4), torch.empty(4)
    assert private.storage_key(x) == private.storage_key(x[1:])
    assert private.storage_key(x) != private.storage_key(y)


def addmm_gelu() -> None:
    bias, x, weight = torch.randn(3), torch.randn(4, 5), torch.randn(5, 3)
    out = torch.empty(4, 3)
    assert private.addmm_gelu(bias, x, weight, out) is out
    assert_close(out, F.gelu(bias + x @ weight, approximate="tanh"), rms=1e-3)  # a CPU computes GELU by erf, not tanh
    assert private.ADDMM_GELU.default._schema.name == "aten::_addmm_activation"


def cpu_attention() -> None:
    q, k, v = qkv()
    out, lse = private.cpu_attention(q, k, v)
    scores = q @ k.mT / 8**0.5
    assert_close(out, scores.softmax(-1) @ v, rms=1e-6)
    assert_close(lse, scores.logsumexp(-1), rms=1e-6)


def gpu_attention(kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Check the shapes of a GPU's attention on fake tensors; its values need a GPU."""
    q, k, v = (x.to("meta", torch.bfloat16) for x in qkv())
    out, lse = kernel(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert lse.dtype == torch.float32
    assert lse.shape[:2] == q.shape[:2]
    assert lse.shape[2] >= q.shape[2]


def onednn_linear() -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN; plain products are taken")
    x, weight, bias = torch.randn(6, 32), torch.randn(16, 32), torch.randn(16)
    for laid_out in (weight, onednn.pack(weight)):
        assert_close(onednn.linear(x, laid_out, bias), F.linear(x, weight, bias), rms=1e-6)
        expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
        assert_close(onednn.linear(x, laid_out, bias, gelu=True), expected, rms=1e-5)


def dispatch_modes() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():  # type: ignore[no-untyped-call]
        assert (x + x).tolist() == [2, 2]
    assert torch.ops.aten.add in seen
    assert tree_leaves(([1, {"a": 2}], 3)) == [1, 2, 3]


def unsafe_view() -> None:
    assert torch.ops.aten._unsafe_view(torch.ones(4), [2, 2]).shape == (2, 2)


CHECKS: dict[str, Callable[[], None]] = {
    "_cdata": storage_keys,
    "torch._addmm_activation": addmm_gelu,
    "torch._subclasses.fake_tensor": fake_tensors,
    "torch.cpu._is_amx_tile_supported": lambda: _is_bool(private.cpu_has_amx()),
    "torch.cpu._is_avx512_bf16_supported": lambda: _is_bool(private.cpu_multiplies_bfloat16()),
    "torch.ops.aten._addmm_activation": addmm_gelu,
    "torch.ops.aten._scaled_dot_product_efficient_attention": lambda: gpu_attention(private.efficient_attention),
    "torch.ops.aten._scaled_dot_product_flash_attention": lambda: gpu_attention(private.flash_attention),
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": cpu_attention,
    "torch.ops.aten._unsafe_view": unsafe_view,
    "torch.ops.mkldnn._linear_pointwise": onednn_linear,
    "torch.ops.mkldnn._reorder_linear_weight": onednn_linear,
    "torch.utils._python_dispatch": dispatch_modes,
    "torch.utils._pytree": dispatch_modes,
}


def _is_bool(value: object) -> None:
    assert isinstance(value, bool)


def test_every_private_name_is_checked() -> None:
    unchecked = {name: used()[name] for name in used().keys() - CHECKS.keys()}
    assert not unchecked, f"PyTorch doesn't promise these; call each in CHECKS: {unchecked}"


@pytest.mark.parametrize("name", CHECKS)
def test_it_does_what_we_need(name: str) -> None:
    users = ", ".join(used().get(name, []))
    try:
        CHECKS[name]()
    except pytest.skip.Exception:
        raise
    except Exception as error:
        pytest.fail(f"PyTorch {torch.__version__} changed {name}, on which {users} depends: {error!r}")


@pytest.mark.parametrize("name", sorted(CHECKS.keys() - SEVERAL))
def test_one_module_calls_it(name: str) -> None:
    users = used().get(name, [])
    assert len(users) <= 1, f"{name} is used in {users}; call it in one module, through a function"


def test_names_are_found() -> None:
    source = (
        "import torch\nfrom torch._x.y import z\ntorch.ops.aten._w(1)\naten._v\nt.untyped_storage()._cdata\nself._own()"
    )
    assert private_names(source) == {"torch._x.y", "torch.ops.aten._w", "torch.ops.aten._v", "_cdata"}
