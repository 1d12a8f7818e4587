"""Fixtures shared by the tests: golden cases, random checkpoints, error measures, seeds."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tests that run side by side get one thread each, and so do the programs that they start: more threads than cores would
# wait for each other. PyTorch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
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

# Every test draws the same random inputs in every run. `make fuzz` sets the variable, and other inputs are drawn from it.
FUZZ_SEED = os.environ.get("MOGLE_RT_FUZZ_SEED")
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed" if FUZZ_SEED is None else "fuzz")
MORE_EXAMPLES = 10  # times as many in a fuzzing run

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("*.safetensors"))


def examples(count: int) -> hypothesis.settings:
    """How many examples hypothesis tries of a test's inputs; a fuzzing run tries more.

    A test function may share function-scoped fixtures, such as a folder, between its examples.
    """
    shared = [hypothesis.HealthCheck.function_scoped_fixture]
    many = count if FUZZ_SEED is None else count * MORE_EXAMPLES
    return hypothesis.settings(max_examples=many, suppress_health_check=shared)


def relative_rms(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, computed in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_close(a: Tensor, b: Tensor, *, rms: float, largest: float | None = None) -> None:
    """Check the relative RMS error, and the largest error relative to b's largest value (by default 20 times rms)."""
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


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make quick` doesn't import the files in which no test is marked for it: that would take as long as the tests."""
    if config.option.markexpr != "quick" or not collection_path.name.startswith("test_"):
        return None
    return None if "pytest.mark.quick" in collection_path.read_text() else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names that hold an address in memory: processes that test side by side must give a test the same name."""
    for item in items:
        if re.search(r" at 0x[0-9a-f]+", item.nodeid):
            raise pytest.UsageError(f"{item.nodeid}: the name differs from process to process; give the values ids")


def make_once(path: Path, make: Callable[[Path], object]) -> Path:
    """The path, after ``make`` has written it; only one of the processes that test side by side does so."""
    done = path.with_name(f"{path.name}.done")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(path)
            done.touch()
    return path


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the whole run, the same for all processes that test side by side. See `make_once`."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"


@pytest.fixture(scope="session")
def golden_bundle(shared_folder: Path) -> Callable[[str], Path]:
    """The bundle of a golden checkpoint, converted once. Read-only."""

    def bundle(name: str) -> Path:
        return make_once(shared_folder / f"{name}.safetensors", Files(GOLDEN / "checkpoints" / name).convert)

    return bundle


@pytest.fixture(scope="session")
def tiny_files(shared_folder: Path) -> Files:
    """A random tiny checkpoint with text encoders. Read-only: tests that damage files copy them first."""
    return Files(make_once(shared_folder / "tiny", lambda folder: write_checkpoint(folder, text_encoders=True)))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_files: Files, shared_folder: Path) -> Path:
    """The bundle of `tiny_files`. Read-only as well."""
    return make_once(shared_folder / "bundle" / "tiny.safetensors", tiny_files.convert)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Make what a test draws independent of the tests that ran before it, here or in another process."""
    seed = int(FUZZ_SEED or 0) % 2**32
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
