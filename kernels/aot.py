"""Compiles recorded launches for GPUs that need not be present, and reads registers, spills and instructions.

The tools that come with Triton are enough for this; no driver is needed. It doesn't work in Triton's interpreter, so
``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mogle_rt.kernels.common import Launch
from mogle_rt.kernels.workloads import DTYPES, variants, workloads
from mogle_rt.kernels.workloads_in_few_bits import few_bits

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
POINTERS |= {torch.int8: "*i8", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv"}
# The instructions that are counted: matrix products, copies into shared memory, the widest and the narrowest accesses.
CUDA_INSTRUCTIONS = re.compile(
    r"\b(HMMA|HGMMA|UTCHMMA|IMMA|IGMMA|UTCIMMA|QMMA|QGMMA|UTCQMMA|LDGSTS|LDG|STG)\b(\.[\w.]*)?",
)
HIP_INSTRUCTIONS = re.compile(
    r"\b(v_mfma|global_load_dwordx4|buffer_load_dwordx4|global_store_dwordx4|buffer_store_dwordx4)"
)
ALIGNED = [["tt.divisibility", 16]]
ACCESSES = ("LDG", "STG", "LDGSTS")
WIDE_LOADS = {"LDG.128", "LDGSTS.128", "global_load_dwordx4", "buffer_load_dwordx4"}
WIDE_STORES = {"STG.128", "global_store_dwordx4", "buffer_store_dwordx4"}
NARROW = {"LDG.16", "STG.16"}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one kernel needs on one GPU.

    Attributes:
        registers: of one thread.
        spills: loads and stores of local memory; on AMD, the number of spilled registers.
        stack, shared: bytes.
        instructions: how often each of the counted instructions occurs.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    instructions: dict[str, int]

    @property
    def tensor_cores(self) -> str:
        """The matrix instruction that the kernel uses most; empty if it uses none.

        wgmma, tcgen05, mma or mfma for 16 bits and TF32; with s8 or e4m3 behind it for products in eight bits.
        """
        names = {"UTCIMMA": "tcgen05 s8", "IGMMA": "wgmma s8", "IMMA": "mma s8"}
        names |= {"UTCQMMA": "tcgen05 e4m3", "QGMMA": "wgmma e4m3", "QMMA": "mma e4m3"}
        names |= {"UTCHMMA": "tcgen05", "HGMMA": "wgmma", "HMMA": "mma", "v_mfma": "mfma"}
        return next((name for sass, name in names.items() if self.instructions.get(sass)), "")

    @property
    def wide_loads(self) -> int:
        """How many instructions load 16 bytes per thread."""
        return sum(n for name, n in self.instructions.items() if name in WIDE_LOADS)

    @property
    def wide_stores(self) -> int:
        """How many instructions store 16 bytes per thread."""
        return sum(n for name, n in self.instructions.items() if name in WIDE_STORES)

    @property
    def narrow_accesses(self) -> int:
        """How many instructions load or store two bytes per thread; counted on NVIDIA GPUs only."""
        return sum(n for name, n in self.instructions.items() if name in NARROW)


def _source(launch: Launch) -> Any:
    """The launch's kernel, specialised as on a GPU: for arguments that are 1 and for multiples of 16."""
    kernel = launch.kernel
    signature, constants, attributes = {}, dict(launch.meta), {}
    values = dict(zip(kernel.arg_names, launch.args, strict=False))
    for name in ("num_warps", "num_stages"):
        constants.pop(name, None)
    for i, name in enumerate(kernel.arg_names):
        value = values.get(name, constants.get(name))
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = ALIGNED  # allocations start at multiples of 256 bytes
        elif name in values and isinstance(value, float):
            signature[name] = "fp32"
        elif name in values and isinstance(value, int) and value != 1:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = ALIGNED
        else:
            signature[name] = "constexpr"
            constants[name] = value
    return ASTSource(kernel, signature, constants, attributes)


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile a launch for one of `TARGETS`, and disassemble the result."""
    options = {name: launch.meta[name] for name in ("num_warps", "num_stages") if name in launch.meta}
    if target.startswith("sm_"):
        compiled = triton.compile(_source(launch), target=GPUTarget("cuda", int(target[3:]), 32), options=options)
        registers, spills, stack, instructions = _read_cuda(compiled)
    else:
        if launch.meta.get("PRECISION") == "tf32x3":  # what `precision` returns on AMD
            launch = dataclasses.replace(launch, meta=launch.meta | {"PRECISION": "ieee"})
        compiled = triton.compile(_source(launch), target=GPUTarget("hip", target, 64), options=options)
        registers, spills, stack, instructions = _read_hip(compiled)
    return Resources(
        kernel=launch.kernel.__name__.removeprefix("_").removesuffix("_kernel"),
        target=target,
        registers=registers,
        spills=spills,
        stack=stack,
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        instructions=instructions,
    )


def _launches(name: str, dtype: str) -> list[Launch]:
    known = [*workloads(DTYPES[dtype], "meta"), *variants(DTYPES[dtype]), *few_bits(DTYPES[dtype], "meta")]
    return next(w for w in known if w.name == name).launches()


def _compile_one(name: str, dtype: str, number: int, target: str) -> Resources:
    return compile_launch(_launches(name, dtype)[number], target)


def _identity(launch: Launch) -> Any:
    """A key that is equal for launches which are compiled into the same code."""
    source = _source(launch)
    options = {name: launch.meta.get(name) for name in ("num_warps", "num_stages")}
    parts = (source.signature, source.constants, source.attrs, options)
    return launch.kernel.__name__, *(repr(sorted(part.items(), key=str)) for part in parts)


def compile_all(
    names: Sequence[str], dtypes: Sequence[str], targets: Sequence[str]
) -> list[tuple[str, str, Resources]]:
    """Compile every launch of these workloads on all cores: workload, dtype and `Resources` of each.

    Launches that give the same code are compiled only once.
    """
    return compile_jobs(list(itertools.product(names, dtypes, targets)))


def compile_jobs(jobs: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, Resources]]:
    """`compile_all` for chosen triples of workload, dtype and target."""
    made = {pair: _launches(*pair) for pair in dict.fromkeys((name, dtype) for name, dtype, _ in jobs)}
    asked = [
        (name, dtype, (_identity(launch), target), (name, dtype, number, target))
        for name, dtype, target in jobs
        for number, launch in enumerate(made[name, dtype])
    ]
    distinct = {key: job for _, _, key, job in reversed(asked)}
    context = multiprocessing.get_context("spawn")  # a forked child could inherit a lock that one of our threads holds
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        done = dict(zip(distinct, pool.map(_compile_one, *zip(*distinct.values(), strict=True)), strict=True))
    return [(name, dtype, done[key]) for name, dtype, key, _ in asked]


def _tool(tool: Any, *arguments: str) -> str:
    done = subprocess.run([tool.path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _read_cuda(compiled: Any) -> tuple[int, int, int, dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool(knobs.nvidia.cuobjdump, "--dump-resource-usage", cubin.name)
        sass = _tool(knobs.nvidia.nvdisasm, "-c", cubin.name)
    found: Counter[str] = Counter()
    for opcode, modifiers in CUDA_INSTRUCTIONS.findall(sass):
        if opcode not in ACCESSES:
            found[opcode] += 1
            continue
        # The width of an access is a modifier; accesses of four bytes have none.
        for width in ("128", "16"):
            if re.search(rf"\.[US]?{width}\b", modifiers):
                found[f"{opcode}.{width}"] += 1
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return _number(r"REG:(\d+)", usage), spills, _number(r"STACK:(\d+)", usage), dict(found)


def _read_hip(compiled: Any) -> tuple[int, int, int, dict[str, int]]:
    text = compiled.asm["amdgcn"]
    found = Counter(HIP_INSTRUCTIONS.findall(text))
    spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text) + _number(r"\.sgpr_spill_count:\s+(\d+)", text)
    stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return _number(r"\.vgpr_count:\s+(\d+)", text), spills, stack, dict(found)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in the tool's output"
    return int(found[1])
