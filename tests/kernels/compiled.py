"""``python -m tests.kernels.compiled``: compile kernels, and print as JSON what the tests ask of the machine code.

Compiling takes most of a minute on a core, so nothing is compiled twice that is known to give the same code:

- GPUs of one generation get the same code (`SAME_CODE`). One kernel is compiled for all of them to show it.
- The three calls over the residual stream launch one kernel. `residual_norm_modulate` uses all of its parts, so the
  other two calls are compiled for one generation only.
- In fp32, registers or shared memory may not suffice. So kernels are compiled for the generation with the least shared
  memory, and those with the largest tiles also for Hopper, where they have other instructions.
- Values are clipped in fp16 only, so one kernel is compiled in fp16.
- Kernels for weights of few bits are compiled for the GPUs on which they have instructions of their own.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from mogle_rt.kernels.aot import compile_jobs

SAME_CODE = {"sm_80": ("sm_86", "sm_89")}
GENERATIONS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
WHOLE = (
    *("residual_norm_modulate", "qk_norm_rope", "gate_mix", "gate_mix_mean"),
    *("region_experts", "region_expert_mix", "joint_attention"),
)
LARGE_TILES = ("region_experts", "joint_attention")
OF_ONE_GENERATION = "residual"  # the call that is compiled for every GPU in `SAME_CODE`
VARIANTS = (
    *("gate_mix-batch32", "gate_mix_mean-batch32", "region_expert_mix-batch32"),
    "residual_norm_modulate-plain",
    *("joint_attention-joint", "joint_attention-separate", "joint_attention-independent"),
)
FEW_BITS = (
    *(("quantize_rows-int8", target) for target in ("sm_90", "gfx942")),
    *(("scaled_linear-int8", target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
    ("scaled_linear-int8-gelu", "sm_90"),
    ("quantize_rows-fp8", "sm_89"),
    *(("scaled_linear-fp8", target) for target in ("sm_89", "sm_90", "sm_100")),
    *(("int4_linear", target) for target in ("sm_89", "sm_90", "sm_120", "gfx942")),
)


def jobs() -> list[tuple[str, str, str]]:
    """What is compiled: the call, the dtype and the GPU of each."""
    siblings = {target for family in SAME_CODE.items() for target in (family[0], *family[1])}
    return [
        *((name, "bf16", target) for name in WHOLE for target in GENERATIONS),
        *((OF_ONE_GENERATION, "bf16", target) for target in sorted(siblings)),
        *((name, "bf16", "sm_90") for name in ("norm_modulate", *VARIANTS)),
        *((name, "fp32", "sm_80") for name in WHOLE),
        *((name, "fp32", "sm_90") for name in LARGE_TILES),
        ("residual_norm_modulate-clipped", "fp16", "sm_90"),
        *((name, "bf16", target) for name, target in FEW_BITS),
    ]


def main() -> None:
    """Compile everything, and print the results."""
    read = ("tensor_cores", "wide_loads", "wide_stores", "narrow_accesses")
    rows = [
        {"workload": name, "dtype": dtype, **dataclasses.asdict(r)} | {what: getattr(r, what) for what in read}
        for name, dtype, r in compile_jobs(jobs())
    ]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
