"""The kernels for weights in eight and four bits as custom operators, see `mogle_rt.ops.triton_ops`."""

from __future__ import annotations

import torch

from mogle_rt.kernels import int4_linear as four_bits
from mogle_rt.kernels import quantize_rows as rows
from mogle_rt.kernels import scaled_linear as eight_bits
from mogle_rt.ops.triton_ops import define

FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply float8

quantize_rows = define(
    rows, "quantize_rows", "Tensor x, Tensor? more, Tensor(a!) out, Tensor(b!) scales, SymInt rotation"
)
_EPILOGUE = "Tensor bias, Tensor? low, Tensor? up, Tensor(a!) out, bool gelu"
scaled_linear = define(
    eight_bits,
    "scaled_linear",
    f"Tensor x, Tensor x_scales, Tensor weight, Tensor weight_scales, {_EPILOGUE}",
)
int4_linear = define(
    four_bits,
    "int4_linear",
    f"Tensor x, Tensor packed, Tensor scales, Tensor? down, Tensor? rank_up, SymInt[] heights, bool add, {_EPILOGUE}",
)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has products of float8. Without a GPU, CUDA and meta tensors stand for those of one that has."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
