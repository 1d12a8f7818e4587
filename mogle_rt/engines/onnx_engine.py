"""The engine that runs exported graphs with onnxruntime. It has the same interface as the torch engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.exported import TYPES, ExportedGraphs, Session, StepPreparation, manifest_dtype
from mogle_rt.engines.onnxruntime_import import load_onnxruntime
from mogle_rt.engines.velocity import VelocityLoop
from mogle_rt.loop.schedule import Schedule


class OnnxEngine(VelocityLoop):
    """Runs Face-MoGLE's step from an export with onnxruntime.

    Args:
        exported: the export.
        device: cpu or cuda. On cuda, inputs and results stay on the GPU.

    Raises:
        DeviceError: see `load_onnxruntime`.
    """

    def __init__(self, exported: ExportedGraphs, device: torch.device) -> None:
        load_onnxruntime(device, manifest_dtype(exported.manifest))  # reports problems now and not at the first call
        self.prepare_step = StepPreparation(exported, device)
        self.device = device
        self._step: Session | None = None
        self._binding: Any = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def prepare(self, conditions: Conditions, schedule: Schedule) -> None:
        """Compute the inputs that no step changes, and bind them to the step's graph."""
        self.follow(schedule, self.device, conditions)
        name = "step" if conditions.condition_scale == 1 else "step_scaled"
        self._inputs = self.prepare_step(conditions, schedule)
        if self._step is None or self._step.graph.file != self.prepare_step.exported.graph(name).file:
            self._step = self._binding = None  # frees the other graph, so that only one's weights are in memory
            self._step = self.prepare_step.session(name)
        batch, tokens, channels = conditions.masks.batch, conditions.masks.tokens, conditions.masks.planes.shape[2]
        dtype = TYPES[self._step.graph.outputs[0].dtype]
        self._inputs["latents"] = torch.empty(batch, tokens, channels, dtype=dtype, device=self.device)
        self._inputs["step"] = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._outputs = self._step.outputs(batch=batch, tokens=tokens)
        self._binding = self._step.binding(self._inputs, self._outputs)

    @property
    def execution(self) -> str:
        """How steps are run."""
        return f"onnxruntime on {self.device.type}"

    @torch.inference_mode()
    def step(self, latents: Tensor, k: int) -> Tensor:
        """The velocity at step k of the prepared run: [B, N, 64] -> [B, N, 64]."""
        self.run(latents, k)
        return self._outputs["velocity"].clone()

    @torch.inference_mode()
    def condition(self, latents: Tensor, k: int) -> Tensor:
        """The condition tokens of step k: [B, N, 64] -> [B, N, 64]. This runs the whole step."""
        self.run(latents, k)
        return self._outputs["condition"].clone()

    def run(self, latents: Tensor, k: int) -> None:
        """Run step k. The results are in the bound outputs."""
        if self._step is None or self._binding is None:
            raise RuntimeError("prepare() must be called before step()")
        self._inputs["latents"].copy_(latents)
        self._inputs["step"].fill_(k)
        self._step.run(self._binding)
