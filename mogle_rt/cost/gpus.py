"""The best that cards can do by their datasheets, and lower bounds on a job's time. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mogle_rt.errors import ConfigError

if TYPE_CHECKING:
    from mogle_rt.cost.counting import Count

RESERVED_GIB = 1.0  # CUDA context, the libraries' workspaces, the allocator's gaps: memory that no tensor gets


@dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
        name: its common name.
        half_tflops: dense fp16 and bf16 matrix products on tensor cores with fp32 sums, TFLOP/s. Datasheets of data
            centre cards since Ampere print twice that, "with sparsity"; GeForce whitepapers print fp16 sums too.
        int8_tops, fp8_tflops: dense products of eight-bit numbers with sums of 32 bits, of the same sources; 0 if the
            card has no such instructions. GeForce cards have twice the rate for int8 that they have for fp8.
        single_tflops: fp32 without TF32 (PyTorch's default for matrix products), TFLOP/s.
        bandwidth: of its memory, GB/s (10^9 bytes).
        memory: GiB.
        link: PCI Express to the host, in one direction, GB/s: 15.75 for 8 lanes of version 4, 31.5 for 16, 63 for 16 of
            version 5.
    """

    name: str
    half_tflops: float
    int8_tops: float
    fp8_tflops: float
    single_tflops: float
    bandwidth: float
    memory: float
    link: float

    def compute_ms(self, count: Count, itemsize: int, weights: str | None = None) -> float:
        """Time that the operations of a count take at least, ms.

        Args:
            itemsize: bytes of the values.
            weights: the format of weights in few bits, if there are such.
        """
        rate = self.half_tflops if itemsize == 2 else self.single_tflops
        narrow = {"int8": self.int8_tops, "fp8": self.fp8_tflops}.get(weights or "", 0.0) or rate
        return (count.eight_bit_flops / narrow + (count.flops - count.eight_bit_flops) / rate) / 1e9

    def memory_ms(self, moved: float) -> float:
        """Time that reading and writing ``moved`` bytes takes at least, ms."""
        return moved / self.bandwidth / 1e6

    def fits(self, needed: float) -> bool:
        """Whether ``needed`` bytes of tensors go into its memory, next to what each process needs anyway."""
        return needed <= (self.memory - RESERVED_GIB) * 2**30


GPUS = (
    # NVIDIA H100 Tensor Core GPU datasheet (SXM and PCIe; 1,979 and 1,513 TFLOPS with sparsity), and the Hopper
    # architecture whitepaper, table 2: https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    Gpu("H100 SXM", 989.4, 1978.9, 1978.9, 66.9, 3350, 80, 63),
    Gpu("H100 PCIe", 756.5, 1513, 1513, 51.2, 2000, 80, 63),
    # NVIDIA H200 Tensor Core GPU datasheet:
    # https://resources.nvidia.com/en-us-data-center-overview-mc/en-us-data-center-overview/hpc-datasheet-sc23-h200
    Gpu("H200", 989.4, 1978.9, 1978.9, 66.9, 4800, 141, 63),
    # NVIDIA DGX B200 datasheet, an eighth of eight: https://resources.nvidia.com/en-us-dgx-systems/dgx-b200-datasheet
    Gpu("B200", 2250, 4500, 4500, 75, 8000, 180, 63),
    # NVIDIA A100 datasheet (SXM):
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    Gpu("A100 80GB", 312, 624, 0, 19.5, 2039, 80, 31.5),
    Gpu("A100 40GB", 312, 624, 0, 19.5, 1555, 40, 31.5),
    # NVIDIA L40S, L4 and A10 datasheets: https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413,
    # https://www.nvidia.com/en-us/data-center/l4/, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf
    Gpu("L40S", 362.05, 733, 733, 91.6, 864, 48, 31.5),
    Gpu("L4", 121, 242.5, 242.5, 30.3, 300, 24, 31.5),
    Gpu("A10", 125, 250, 0, 31.2, 600, 24, 31.5),
    # NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A (BF16 with FP32 accumulate):
    # https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
    Gpu("RTX 5090", 209.5, 838, 419, 104.8, 1792, 32, 63),
    # NVIDIA Ada GPU Architecture whitepaper V2, appendix A (BF16 with FP32 accumulate):
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    Gpu("RTX 4090", 165.2, 660.6, 330.3, 82.6, 1008, 24, 31.5),
    Gpu("RTX 4080", 97.5, 389.9, 194.9, 48.7, 717, 16, 31.5),
    # No whitepaper has it: 46 SMs x 512 FLOP a cycle (the 4090's, per SM) x 2.475 GHz, and
    # https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4070-family/
    Gpu("RTX 4070", 58.3, 233.2, 116.6, 29.1, 504, 12, 31.5),
    # No whitepaper has it: 24 SMs x 512 FLOP a cycle (the 4090's, per SM) x 2.46 GHz, and
    # https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4060-4060ti/
    Gpu("RTX 4060 8GB", 30.2, 120.9, 60.5, 15.1, 272, 8, 15.75),
    # NVIDIA Ampere GA102 GPU Architecture whitepaper V2, appendix A (BF16 with FP32 accumulate):
    # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    Gpu("RTX 3090", 71, 284, 0, 35.6, 936, 24, 31.5),
    # No whitepaper has it: 28 SMs x 512 FLOP a cycle (the 3090's, per SM) x 1.78 GHz, and
    # https://www.nvidia.com/en-us/geforce/graphics-cards/30-series/rtx-3060-3060ti/
    Gpu("RTX 3060 12GB", 25.5, 102, 0, 12.7, 360, 12, 31.5),
)


def find_gpu(name: str) -> Gpu:
    """The card of that name, or the only one whose name contains it; case, spaces and hyphens don't matter.

    Raises:
        ConfigError: there is no such card, or there are several; the message lists the known ones.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    exact = [gpu for gpu in GPUS if plain(gpu.name) == plain(name)]
    found = exact or [gpu for gpu in GPUS if plain(name) and plain(name) in plain(gpu.name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(gpu.name for gpu in found or GPUS)
    raise ConfigError(f"gpu {name!r} is {'one of several' if found else 'unknown'}; known: {known}")
