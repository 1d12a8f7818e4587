"""Count what PyTorch code does, on tensors without memory: launches, FLOPs, bytes moved and bytes alive.

Units: bytes, floating point operations (a multiply-add is two). An operation is one kernel launch; views and
allocations are free; attention is one operation. Bytes read and written are those of its operands: nothing is assumed
to stay in a cache between operations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

from mogle_rt.torch_api.private import ADDMM_GELU, efficient_attention, flash_attention, storage_key

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Count:
    """What a piece of code did.

    Attributes:
        launches: the number of kernels. flops: those of matrix products, convolutions and attention.
        eight_bit_flops: those among them that multiply numbers of eight bits.
        read, written: bytes. peak: the most bytes that were alive at once, among storages made since counting began.
    """

    launches: int = 0
    flops: int = 0
    eight_bit_flops: int = 0
    read: int = 0
    written: int = 0
    peak: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def __add__(self, other: Count) -> Count:
        """The cost of running one after the other; the peak is the larger one."""
        return Count(
            launches=self.launches + other.launches,
            flops=self.flops + other.flops,
            eight_bit_flops=self.eight_bit_flops + other.eight_bit_flops,
            read=self.read + other.read,
            written=self.written + other.written,
            peak=max(self.peak, other.peak),
        )

    def __mul__(self, times: int) -> Count:
        """The cost of running this ``times`` times; the peak stays the same."""
        return Count(
            launches=self.launches * times,
            flops=self.flops * times,
            eight_bit_flops=self.eight_bit_flops * times,
            read=self.read * times,
            written=self.written * times,
            peak=self.peak,
        )


# These launch no kernel, although their schemas don't call them views: allocations, and views made in place.
FREE = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
FREE |= {aten.resize_, aten.set_, aten.squeeze_, aten.unsqueeze_, aten.transpose_, aten.t_, aten.as_strided_}
OVERWRITE = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_}  # the old values aren't read
SHAPED = {aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full}  # read nothing
GATHER = {aten.embedding, aten.index, aten.index_select, aten.gather}  # read only what they return of the first


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _touched(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors; elements that an expanded view repeats are counted once."""
    total = 0
    for t in tensors:
        size = t.element_size()
        for length, stride in zip(t.shape, t.stride(), strict=True):
            size *= length if stride else min(length, 1)
        total += size
    return total


def _signature(value: Any, tensors: list[Tensor]) -> object:
    """All that an operation's work and results follow from: shapes and types of tensors, and the other arguments.

    The tensors are added to ``tensors``, in their order.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple([_signature(item, tensors) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _signature(item, tensors)) for name, item in value.items()])
    return type(value), value


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor fills its storage, as a new one of its shape and strides would."""
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return not tensor.storage_offset() and new.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()


@dataclass(frozen=True)
class _Seen:
    """What an operation did. With arguments of the same shapes it does the same, so it needn't be run again.

    A model's blocks are alike, and PyTorch finds the shapes of results on the meta device by slow Python code.

    Attributes:
        done: its count.
        leaves: its results: a tensor is the number of the operand that it is, or shape, strides and dtype of a new one.
        spec: how the results are nested.
    """

    done: Count
    leaves: Sequence[Any]
    spec: TreeSpec

    @staticmethod
    def suits(operands: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
        """Whether all is on the meta device, and each result is an operand or has a plain storage of its own."""
        if any(t.device.type != "meta" for t in (*operands, *results)):
            return False
        held = {storage_key(t) for t in operands}
        new = [r for r in results if all(r is not t for t in operands)]
        own = {storage_key(r) for r in new}
        return len(own) == len(new) and not own & held and all(map(_plain, new))

    @classmethod
    def of(cls, done: Count, operands: Sequence[Tensor], out: Any) -> _Seen:
        leaves, spec = tree_flatten(out)
        places = {id(t): place for place, t in enumerate(operands)}
        kept = [
            (places.get(id(leaf), (leaf.shape, leaf.stride(), leaf.dtype)),) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        return cls(done, kept, spec)

    def again(self, operands: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """The results for other operands, and those of them that are new."""
        made: list[Tensor] = []
        leaves = list(self.leaves)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, tuple):
                (tensor,) = leaf
                if isinstance(tensor, int):
                    leaves[i] = operands[tensor]
                else:
                    shape, strides, dtype = tensor
                    leaves[i] = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
                    made.append(leaves[i])
        return tree_unflatten(leaves, self.spec), made


class OpCounter(TorchDispatchMode):
    """Counts the operations on devices other than the CPU, and follows the memory that they allocate there.

    Attributes:
        live: bytes of the storages that were made under this counter and are still alive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self._count = Count()
        self._storages: set[int] = set()
        self._basic: set[Any] = set()  # operations that can't be decomposed into others
        self._seen: dict[object, _Seen] = {}  # what operations did, by their arguments' shapes

    def take(self) -> Count:
        """What was done since the last call (or since the start). The next peak starts from the bytes alive now."""
        taken, self._count = self._count, Count(peak=self.live)
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions about a tensor
            return func(*args, **kwargs)
        if func not in self._basic:  # inference mode passes composite operations undivided
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            self._basic.add(func)
        operands: list[Tensor] = []
        signature = func, _signature((args, kwargs), operands)
        seen = self._seen.get(signature)
        if seen is not None:
            out, made = seen.again(operands)
            self._follow([], made)
            self._count += dataclasses.replace(seen.done, peak=self.live)
            return out
        out = func(*args, **kwargs)
        results = _tensors(out)
        if func.is_view or all(t.device.type == "cpu" for t in (*operands, *results)):
            return out
        self._follow(operands, results)
        if func.overloadpacket in FREE:
            done = Count()
        else:
            done = self._done(func, args, kwargs, operands, results, out)
            if _Seen.suits(operands, results):
                self._seen[signature] = _Seen.of(done, operands, out)
        self._count += dataclasses.replace(done, peak=self.live)
        return out

    def _done(
        self, func: Any, args: Any, kwargs: Any, operands: list[Tensor], results: list[Tensor], out: Any
    ) -> Count:
        if func.namespace == "mogle_rt":  # a fused kernel declares its own cost
            from mogle_rt.ops import triton_ops

            name = func.overloadpacket._qualified_op_name
            own = triton_ops.declared(name, args)
            narrow = own.flops if name == "mogle_rt::scaled_linear" else 0
            return Count(
                launches=own.launches, flops=own.flops, eight_bit_flops=narrow, read=own.read, written=own.written
            )
        packet = func.overloadpacket
        changed: list[Tensor] = []
        blind: list[Tensor] = []  # changed without being read
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
                changed += given
                blind += given if argument.is_out or packet in OVERWRITE else []
        made = [r for r in results if all(r is not c for c in changed)]
        read = 0 if packet in SHAPED else _touched(operands) - _touched(blind)
        if packet in GATHER:
            read += _touched(results) - _touched(operands[:1])
        # addmm_ has the formula of addmm. `out` is a buffer for the operation, but a shape for the formula.
        if packet is ADDMM_GELU:
            packet = aten.addmm
        formula = flop_registry.get(packet) or flop_registry.get(getattr(aten, packet.__name__.rstrip("_"), None))
        options = {name: value for name, value in kwargs.items() if name != "out"}
        flops = int(formula(*args, **options, out_val=out)) if formula else 0
        return Count(launches=1, flops=flops, read=read, written=_touched(changed + made))

    def _follow(self, operands: list[Tensor], results: list[Tensor]) -> None:
        """Add new storages (those that hold no operand) to `live`, and subtract them when they are freed."""
        known = {storage_key(t) for t in operands}
        for tensor in results:
            storage = tensor.untyped_storage()
            address, size = storage_key(tensor), storage.nbytes()
            if address not in known and address not in self._storages:
                self._storages.add(address)
                self.live += size
                weakref.finalize(storage, self._forget, address, size).atexit = False

    def _forget(self, address: int, size: int) -> None:
        self._storages.discard(address)
        self.live -= size


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """Attention as the single operation that a GPU runs."""
    if attn_mask is None:
        return flash_attention(query, key, value)[0]
    return efficient_attention(query, key, value, attn_mask)[0]


class _FusedAttention(TorchFunctionMode):
    """Keeps PyTorch's attention as one operation; on meta and fake tensors it would be decomposed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _tensors((args, kwargs))[0].device.type != "cpu":
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def counting() -> Iterator[OpCounter]:
    """Give an `OpCounter` that counts attention on the meta device as on a GPU.

    Both are modes of the calling thread: what other threads compute in the meantime is neither counted nor changed.
    """
    with torch.no_grad(), _FusedAttention(), OpCounter() as counter:
        yield counter
