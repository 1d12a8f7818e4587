"""The arguments of the kernels for weights in few bits, at FLUX.1-dev's sizes; see `mogle_rt.kernels.workloads`."""

from __future__ import annotations

import torch

from mogle_rt.kernels.inputs import Epilogue
from mogle_rt.kernels.int4_linear import int4_linear, int4_linear_cost, int4_linear_ref
from mogle_rt.kernels.quantize_rows import quantize_rows, quantize_rows_cost, quantize_rows_ref
from mogle_rt.kernels.scaled_linear import scaled_linear, scaled_linear_cost, scaled_linear_ref
from mogle_rt.kernels.workloads import IMAGE, RANK, TEXT, WIDTH, New, Workload

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
GROUP, LOW_RANK = 64, 32


def _bytes(new: New, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    if new.device == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    values = torch.randint(-127, 128, shape, device=new.device)
    return values.to(dtype) if dtype != torch.uint8 else (values & 255).to(dtype)


def few_bits(dtype: torch.dtype, device: str) -> list[Workload]:
    """q, k and v of a double block's image and condition, with the branch's columns; and an MLP's first layer with GELU."""
    new, rows, heights = New(dtype, device), 2 * IMAGE, [WIDTH] * 3
    columns, R = sum(heights), 4 * RANK
    found = []
    for name, eight in EIGHT_BITS.items():
        wide = new(rows, WIDTH + R)
        making = {
            "x": wide[:, :WIDTH],
            "more": None,
            "out": _bytes(new, rows, WIDTH, dtype=eight),
            "scales": new(rows, dtype=torch.float32),
            "rotation": 256 if name == "int8" else 1,
        }
        found.append(Workload(f"quantize_rows-{name}", quantize_rows, quantize_rows_ref, quantize_rows_cost, making))
        arguments = {
            "x": making["out"],
            "x_scales": making["scales"],
            "weight": _bytes(new, columns, WIDTH, dtype=eight),
            "weight_scales": new(columns, dtype=torch.float32),
            "epilogue": Epilogue(new(columns), wide[:, WIDTH:], new(columns, R), new(rows, columns), False),
        }
        mlp = arguments | {
            "weight": _bytes(new, 4 * WIDTH, WIDTH, dtype=eight),
            "weight_scales": new(4 * WIDTH, dtype=torch.float32),
            "epilogue": Epilogue(new(4 * WIDTH), None, None, new(rows, 4 * WIDTH), True),
        }
        found += [
            Workload(f"scaled_linear-{name}{what}", scaled_linear, scaled_linear_ref, scaled_linear_cost, given)
            for what, given in (("", arguments), ("-gelu", mlp))
        ]
    four = {
        "x": new(TEXT + rows, WIDTH + R)[:, :WIDTH],
        "packed": _bytes(new, columns, WIDTH // 2, dtype=torch.uint8),
        "scales": new(columns, WIDTH // GROUP, dtype=torch.bfloat16),
        "down": new(3 * LOW_RANK, WIDTH, dtype=torch.bfloat16),
        "rank_up": new(columns, LOW_RANK, dtype=torch.bfloat16),
        "heights": heights,
        "add": False,
        "epilogue": Epilogue(new(columns), new(TEXT + rows, R), new(columns, R), new(TEXT + rows, columns), False),
    }
    found.append(Workload("int4_linear", int4_linear, int4_linear_ref, int4_linear_cost, four))
    return found
