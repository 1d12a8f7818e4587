"""Each fused kernel is one operator with a schema, which fake tensors, torch.export and torch.compile understand."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from mogle_rt.ops import triton_ops
from tests.conftest import in_the_interpreter
from tests.kernels.cases import BY_NAME, run_seed

pytestmark = in_the_interpreter
NAMES = [name.partition("::")[2] for name in triton_ops.OPERATORS]


def operator(name: str) -> Any:
    return getattr(torch.ops.mogle_rt, name).default


def arguments(name: str, seed: int) -> list[Any]:
    """Arguments in the order of the schema. Tensors share no memory."""
    case = BY_NAME[name]
    sizes = case.small[0] | ({"fused": False} if name == "joint_attention" else {})
    made = case.arguments(seed, torch.float32, **sizes)
    return triton_ops.flat(made[parameter] for parameter in inspect.signature(case.run).parameters)


class Twice(nn.Module):
    """A module that calls the operator twice. All arguments that are no tensors are constants."""

    def __init__(self, name: str, given: list[Any]) -> None:
        super().__init__()
        self.operator = operator(name)
        self.constants = [None if isinstance(value, Tensor) else value for value in given]
        self.places = [i for i, value in enumerate(given) if isinstance(value, Tensor)]

    def forward(self, *tensors: Tensor) -> Tensor:
        given = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            given[place] = tensor
        for _ in range(2):
            self.operator(*given)
        return tensors[0] + 0


def nodes(graph: torch.fx.Graph, name: str) -> int:
    return sum(node.target is operator(name) for node in graph.nodes)


def test_every_operator_is_here() -> None:
    assert set(NAMES) == set(BY_NAME)


@pytest.mark.parametrize("name", NAMES)
def test_schema_and_fake(name: str) -> None:
    """The operator changes only the tensors that its schema names, and on fake tensors it does nothing."""
    checks = ("test_schema", "test_faketensor")
    found = torch.library.opcheck(operator(name), tuple(arguments(name, run_seed())), test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize("name", NAMES)
def test_export_and_compile_see_one_operator(name: str) -> None:
    seed = run_seed()
    eager, compiled = (arguments(name, seed) for _ in range(2))
    module = Twice(name, eager)
    tensors, others = ([value for value in given if isinstance(value, Tensor)] for given in (eager, compiled))
    exported = torch.export.export(module, tuple(tensors))
    assert nodes(exported.graph, name) == 2
    seen: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(module.graph)
        return aot_eager(module, inputs)

    module(*tensors)
    torch._dynamo.reset()  # otherwise the other kernels' graphs would count as recompilations of this one
    torch.compile(module, backend=backend, fullgraph=True)(*others)
    assert [nodes(graph, name) for graph in seen] == [2]
    for mine, other in zip(tensors, others, strict=True):
        assert torch.equal(mine.nan_to_num(7.0), other.nan_to_num(7.0))
