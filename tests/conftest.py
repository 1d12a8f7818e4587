"""Fixtures shared by the tests: golden cases, random checkpoints, error measures."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

# Triton decides when it is imported: kernels run on the GPU where there is one, else in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from mogle_rt.config import ModelConfig
from mogle_rt.engines.contract import Conditions
from tests.checkpoints import Files, write_checkpoint

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ["TRITON_INTERPRET"] == "1"
needs_triton = pytest.mark.skipif(not TRITON, reason="triton comes for x86-64 Linux alone")
in_the_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="kernels are compiled in this process, or missing; TRITON_INTERPRET=1 has them interpreted"
)
collect_ignore_glob = [] if TRITON else ["kernels/test_*.py"]

if INTERPRETED:
    from tests.kernels.interpreter import correct_bfloat16

    correct_bfloat16()

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("*.safetensors"))


def relative_rms(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_close(a: Tensor, b: Tensor, *, rms: float, largest: float | None = None) -> None:
    """Bounds the relative RMS error and the largest error relative to b's largest value (by default 20 times rms)."""
    assert a.shape == b.shape
    assert relative_rms(a, b) <= rms
    assert float((a - b).abs().max() / b.abs().max()) <= (20 * rms if largest is None else largest)


@dataclass(frozen=True)
class GoldenCase:
    """A case of tests/golden: its tensors and what its metadata says."""

    name: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, name: str) -> GoldenCase:
        with safe_open(GOLDEN / "cases" / f"{name}.safetensors", "pt") as f:
            return cls(name, json.loads(f.metadata()["case"]), {k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118

    @property
    def size(self) -> tuple[int, int]:
        return self.settings["height"], self.settings["width"]

    @property
    def model(self) -> ModelConfig:
        scale = self.settings.get("weight_is_scale", False)
        return ModelConfig.from_mapping(self.settings["model"] | {"weight_is_scale": scale})

    @property
    def placement(self) -> dict[str, Any]:
        """The keyword arguments that a call of the pipeline and `Conditions` share."""
        return {
            "guidance_scale": self.settings.get("guidance", 3.5),
            "condition_scale": self.settings.get("condition_scale", 1.0),
            "position_delta": tuple(self.settings.get("position_delta", (0, 0))),
            "position_scale": self.settings.get("position_scale", 1.0),
        }

    @property
    def conditions(self) -> Conditions:
        height, width = self.size
        return Conditions.from_mask_latents(
            self.tensors["mask_latents"],
            prompt_embeds=self.tensors["prompt_embeds"],
            pooled_prompt_embeds=self.tensors["pooled_prompt_embeds"],
            grid=(height // 16, width // 16),
            **self.placement,
        )


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a golden checkpoint, converted once."""
    folder = tmp_path_factory.mktemp("golden")

    def bundle(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        return path if path.exists() else Files(GOLDEN / "checkpoints" / name).convert(path)

    return bundle


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A random tiny checkpoint with text encoders. Read-only: tests that damage files copy them first."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), text_encoders=True)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle. Read-only as well."""
    return tiny_files.convert(tmp_path_factory.mktemp("bundle") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield
