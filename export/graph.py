"""Builds ONNX graphs node by node: nodes, constants, references to weights, and the layers that all graphs consist of.

Only operators of the standard domain are used. Fused operators are used where the opset has them (Gelu from 20;
Attention, RMSNormalization and RotaryEmbedding from 23); in older opsets they are composed of plain operators.

Symbols in shapes: B images, N image tokens, T text tokens, L rows of a sequence, D width, H heads, d head size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mogle_rt import __version__
from mogle_rt.export.weights import Weights

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.uint8: TensorProto.UINT8,
}
OLDEST_OPSET, NEWEST_OPSET, DEFAULT_OPSET = 18, min(25, onnx.defs.onnx_opset_version()), 23
BFLOAT16_OPSET = 22  # the oldest in which all operators that are used here take bfloat16
NORM_EPS = 1e-6  # of LayerNorm and RMSNorm
FP16_LARGEST = 65504.0
LARGEST_FUSED_HEAD = 256  # the widest heads of runtimes' attention kernels; the VAE's only head is wider

Shape = Sequence[int | str]


class GraphBuilder:
    """A graph under construction. Methods take and return the names of values.

    Args:
        name: of the graph.
        dtype: the dtype in which the graph computes; weights of other dtypes are cast.
        opset: see the module.
        weights: where the weights are.
        fused_attention: use the Attention operator if the opset has it. TensorRT refuses it in float32.
    """

    def __init__(
        self, name: str, *, dtype: torch.dtype, opset: int, weights: Weights, fused_attention: bool = True
    ) -> None:
        self.name, self.dtype, self.opset, self.weights = name, dtype, opset, weights
        self.fused = opset >= 23
        self.fused_attention = fused_attention and self.fused
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._casts: dict[tuple[str, int], str] = {}
        self._ints: dict[tuple[str | int, ...], str] = {}
        self._names: dict[str, int] = {}
        self._scopes: list[str] = []

    # Names, values, nodes

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put ``name`` before the names of nodes made inside, so that a node that a runtime refuses can be found."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def _unique(self, word: str) -> str:
        name = "/".join((*self._scopes, word))
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else f"{name}_{count}"

    def input(self, name: str, shape: Shape, dtype: torch.dtype | None = None) -> str:
        """Declare an input. Strings in the shape name dynamic axes."""
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype or self.dtype], list(shape)))
        return name

    def output(self, value: str, name: str, shape: Shape, dtype: torch.dtype | None = None) -> None:
        """Declare a value as an output called ``name``."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=self._unique(f"{name}/Identity")))
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype or self.dtype], list(shape)))

    def nodes_of(self, op: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        name = self._unique(op)
        outputs = [name if count == 1 else f"{name}.{i}" for i in range(count)]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=name, **attributes))
        return outputs

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        return self.nodes_of(op, inputs, 1, **attributes)[0]

    def const(self, value: object, dtype: torch.dtype | None = None) -> str:
        """A small constant inside the graph. By default integers are int64, and floats have the graph's dtype."""
        array = np.asarray(value)
        if dtype is None:
            dtype = torch.int64 if array.dtype.kind == "i" else self.dtype
        kind = ONNX_TYPES[dtype]
        array = array.astype(helper.tensor_dtype_to_np_dtype(kind))
        name = f"const/{onnx.TensorProto.DataType.Name(kind).lower()}{list(array.shape)}_{_digest(array)}"
        if name not in self.initializers:
            self.initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, dtype: torch.dtype | None = None) -> str:
        """A tensor of the bundle, by its full name in the bundle. dtype: that of the graph if it is not given."""
        to = ONNX_TYPES[dtype or self.dtype]
        if self._stored(name) == to:
            return name
        if (name, to) not in self._casts:
            number = sum(weight == name for weight, _ in self._casts) or ""  # a graph rarely needs more than one
            self._casts[name, to] = f"{name}.cast{number}"
            outputs, node = [self._casts[name, to]], f"{name}/Cast{number}"
            self.nodes.append(helper.make_node("Cast", [name], outputs, name=node, to=to))
        return self._casts[name, to]

    def _stored(self, name: str) -> int:
        """The ONNX type in which a tensor of the bundle is stored; the graph gets it as an initializer."""
        if name not in self.initializers:
            self.initializers[name] = self.weights.initializer(name)
        return self.initializers[name].data_type

    def looked_up(self, table: str, numbers: str) -> str:
        """The rows of a table of the bundle with these numbers, in the graph's dtype; no other rows are converted."""
        rows = self.node("Gather", table, numbers, axis=0)
        return rows if self._stored(table) == ONNX_TYPES[self.dtype] else self.cast(rows, self.dtype)

    def model(self) -> onnx.ModelProto:
        """The finished model, without nodes and weights that no output needs."""
        needed = {o.name for o in self.outputs}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        initializers = [t for name, t in self.initializers.items() if name in needed]
        graph = helper.make_graph(kept[::-1], self.name, self.inputs, self.outputs, initializer=initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="mogle_rt",
            producer_version=__version__,
        )

    # Shapes

    def size(self, x: str, axis: int) -> str:
        """The size of an axis, int64 [1]."""
        return self.node("Shape", x, start=axis, end=axis + 1)

    def ints(self, *parts: str | int) -> str:
        """An int64 vector that is joined from numbers and values of shape [1]. Equal parts give the same value."""
        if parts not in self._ints:
            values = (p if isinstance(p, str) else self.const([p]) for p in parts)
            self._ints[parts] = self.node("Concat", *values, axis=0)
        return self._ints[parts]

    def reshape(self, x: str, shape: Sequence[int] | str) -> str:
        """Reshape; 0 keeps the size of an axis, and -1 stands for what remains."""
        return self.node("Reshape", x, shape if isinstance(shape, str) else self.const(list(shape)))

    def rows(self, x: str, start: str | int, end: str | int, axis: int = 1) -> str:
        """x[start:end] along an axis; bounds are numbers or values of shape [1]."""
        bounds = (self.const([b]) if isinstance(b, int) else b for b in (start, end))
        return self.node("Slice", x, *bounds, self.const([axis]))

    def concat(self, parts: Sequence[str], axis: int) -> str:
        """Concatenate; a single part is returned as it is."""
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=axis)

    # Arithmetic

    def cast(self, x: str, dtype: torch.dtype) -> str:
        """Convert to another dtype."""
        return self.node("Cast", x, to=ONNX_TYPES[dtype])

    def to_float32(self, x: str) -> str:
        """Convert a value of the graph's dtype to float32."""
        return x if self.dtype == torch.float32 else self.cast(x, torch.float32)

    def from_float32(self, x: str) -> str:
        """Convert a float32 value to the graph's dtype."""
        return x if self.dtype == torch.float32 else self.cast(x, self.dtype)

    def but_bfloat16(self, op: str, x: str, *inputs: str, **attributes: Any) -> str:
        """A node whose operator onnxruntime lacks in bfloat16 only; in a bfloat16 graph it is computed in float32."""
        if self.dtype != torch.bfloat16:
            return self.node(op, x, *inputs, **attributes)
        return self.from_float32(self.node(op, self.to_float32(x), *inputs, **attributes))

    def add(self, a: str, b: str) -> str:
        """a + b."""
        return self.node("Add", a, b)

    def mul(self, a: str, b: str) -> str:
        """a * b."""
        return self.node("Mul", a, b)

    def silu(self, x: str) -> str:
        """x * sigmoid(x)."""
        return self.mul(x, self.node("Sigmoid", x))

    def gelu(self, x: str) -> str:
        """GELU in its tanh form."""
        if self.opset >= 20:
            return self.node("Gelu", x, approximate="tanh")
        cubic = self.mul(self.mul(x, x), self.mul(x, self.const(0.044715)))
        inner = self.mul(self.add(x, cubic), self.const(math.sqrt(2 / math.pi)))
        return self.mul(self.mul(x, self.const(0.5)), self.add(self.node("Tanh", inner), self.const(1.0)))

    def clip(self, x: str) -> str:
        """Clip float16 values to the finite range, as the reference does."""
        if self.dtype != torch.float16:
            return x
        return self.node("Clip", x, self.const(-FP16_LARGEST), self.const(FP16_LARGEST))

    # Layers

    def gemm(self, x: str, weight: str, bias: str | None = None) -> str:
        """x Wᵀ + b for rows x [rows, in] and a stored weight [out, in]. The bias is [out], or [rows, out] for a sum."""
        return self.node("Gemm", x, weight, *([] if bias is None else [bias]), transB=1)

    def linear(self, x: str, layer: str, *, lora: str | None = None, bias: bool = True) -> str:
        """Apply a layer of the bundle to rows: x Wᵀ + b, and + x Aᵀ Bᵀ if ``lora`` names the layer's branch."""
        y = self.gemm(x, self.weight(f"{layer}.weight"), self.weight(f"{layer}.bias") if bias else None)
        if lora is None:
            return y
        low = self.gemm(x, self.weight(f"{lora}.lora_A.weight"))
        return self.gemm(low, self.weight(f"{lora}.lora_B.weight"), y)

    def layer_norm(self, x: str, width: int) -> str:
        """LayerNorm over the last axis, without weights."""
        return self.node(
            "LayerNormalization", x, self.const(np.ones(width, dtype=np.float32)), axis=-1, epsilon=NORM_EPS
        )

    def norm_modulate(self, x: str, scale: str, shift: str, width: int) -> str:
        """LayerNorm(x) * scale + shift."""
        return self.add(self.mul(self.layer_norm(x, width), scale), shift)

    def gated(self, x: str, gate: str, y: str) -> str:
        """x + gate * y."""
        return self.add(x, self.mul(gate, y))

    def rms_norm(self, x: str, weight: str, epsilon: float = NORM_EPS, *, dtype: torch.dtype | None = None) -> str:
        """RMSNorm over the last axis. dtype: of x, if it is float32 in a graph of another dtype."""
        same = dtype in (None, self.dtype)
        if self.fused and same:
            return self.node("RMSNormalization", x, weight, axis=-1, epsilon=epsilon)
        precise = self.to_float32(x) if same else x
        mean = self.node("ReduceMean", self.mul(precise, precise), self.const([-1]), keepdims=1)
        root = self.node("Sqrt", self.add(mean, self.const(epsilon, torch.float32)))
        return self.mul(self.from_float32(self.node("Div", precise, root)), weight)

    def rope(self, x: str, tables: tuple[str, str], heads: int, head_size: int) -> str:
        """Rotate pairs of neighbouring channels in float32. x: [B, L, H * d]; tables: cosines and sines [B, L, d / 2]."""
        x = self.to_float32(x)
        if self.fused:
            return self.from_float32(self.node("RotaryEmbedding", x, *tables, interleaved=1, num_heads=heads))
        cos, sin = (self.node("Unsqueeze", t, self.const([2])) for t in tables)  # [B, L, 1, d / 2]
        pairs = self.reshape(x, (0, 0, heads, head_size // 2, 2))
        even, odd = (
            self.node("Squeeze", part, self.const([4]))
            for part in self.nodes_of("Split", [pairs], 2, axis=4, num_outputs=2)
        )
        real = self.node("Sub", self.mul(even, cos), self.mul(odd, sin))
        imaginary = self.add(self.mul(even, sin), self.mul(odd, cos))
        joined = self.concat([self.node("Unsqueeze", part, self.const([4])) for part in (real, imaginary)], axis=4)
        return self.from_float32(self.reshape(joined, (0, 0, heads * head_size)))

    def attention(
        self, q: str, k: str, v: str, heads: int, head_size: int, bias: str | None = None, *, scale: float | None = None
    ) -> str:
        """softmax(scale q kᵀ + bias) v. q, k, v: [B, L, H * d]; bias: float32, broadcast to [B, H, Lq, Lk].

        scale: 1 / √d if it is not given. The fused operator is not asked for another one, or for a bias.
        """
        if self.fused_attention and bias is None and scale is None and head_size <= LARGEST_FUSED_HEAD:
            return self.node("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads)
        q, k, v = (self.reshape(x, (0, 0, heads, head_size)) for x in (q, k, v))
        q = self.node("Transpose", q, perm=[0, 2, 1, 3])
        if scale != 1:
            q = self.mul(q, self.const(head_size**-0.5 if scale is None else scale))
        scores = self.to_float32(self.node("MatMul", q, self.node("Transpose", k, perm=[0, 2, 3, 1])))
        if bias is not None:
            scores = self.add(scores, bias)
        weights = self.from_float32(self.node("Softmax", scores, axis=-1))
        out = self.node("MatMul", weights, self.node("Transpose", v, perm=[0, 2, 1, 3]))
        return self.reshape(self.node("Transpose", out, perm=[0, 2, 1, 3]), (0, 0, heads * head_size))


def _digest(array: NDArray[np.generic]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=6).hexdigest()
