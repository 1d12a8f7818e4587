"""The GPUs that the kernels are compiled for ahead of time, in the tests and by ``python -m mogle_rt.kernels``.

This module does not import Triton, because the question whether kernels may run on a GPU also comes up where Triton is
not installed.
"""

from __future__ import annotations

# The bytes of shared memory that a program may use. Sources: the CUDA C++ Programming Guide, table "technical
# specifications per compute capability" (maximum per thread block, less the 1 KiB that the system keeps), and the CDNA 3
# ISA guide for gfx942.
SHARED_LIMITS = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
TARGETS = tuple(SHARED_LIMITS)


def compiled_for(capability: tuple[int, int]) -> bool:
    """Whether the kernels were compiled for NVIDIA GPUs of this compute capability."""
    return f"sm_{capability[0]}{capability[1]}" in SHARED_LIMITS
