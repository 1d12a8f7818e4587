"""The graphs of all that no step changes: modulation tables, text, gate times, RoPE tables, and the experts' outputs."""

from __future__ import annotations

import math

import numpy as np
import onnx
import torch

from mogle_rt.bundle.bundle import BundleConfig
from mogle_rt.bundle.schema import EXPERT_NAMES, SINUSOID_DIM
from mogle_rt.config import NUM_EXPERTS, ModelConfig, TransformerConfig
from mogle_rt.export.graph import GraphBuilder
from mogle_rt.model.positions import ROPE_THETA

SINUSOID_PERIOD = 10_000


def modulation_row_names(config: TransformerConfig) -> list[str]:
    """The names of the modulation table's rows.

    First come the image rows of all double blocks, then their text rows, then the rows that text and image share in single
    blocks, and then those of the last norm. A double block has shift, scale and gate of attention, then shift, scale and
    gate of the MLP. A single block has shift, scale and gate. Scales already contain the 1 that is added to them.
    """
    return [
        *(f"double.{i}.{j}" for i in range(config.num_layers) for j in range(6)),
        *(f"context.{i}.{j}" for i in range(config.num_layers) for j in range(6)),
        *(f"single.{i}.{j}" for i in range(config.num_single_layers) for j in range(3)),
        "out.scale",
        "out.shift",
    ]


def condition_row_names(config: TransformerConfig) -> list[str]:
    """The names of the rows of the condition's modulation table, in the same order."""
    return [
        *(f"double.{i}.{j}" for i in range(config.num_layers) for j in range(6)),
        *(f"single.{i}.{j}" for i in range(config.num_single_layers) for j in range(3)),
    ]


def build_experts(g: GraphBuilder, config: BundleConfig) -> onnx.ModelProto:
    """The graph that makes the experts' outputs and the gate's constant input from the latents of a mask's 20 pictures."""
    C = config.transformer.in_channels
    masks = g.input("mask_latents", ("batch", NUM_EXPERTS, "tokens", C))
    parts = g.nodes_of("Split", [masks], NUM_EXPERTS, axis=1, num_outputs=NUM_EXPERTS)  # [B, 1, N, C] each
    shape = g.ints(g.size(masks, 0), 1, g.size(masks, 2), C)
    outputs = []
    for expert, x in zip(EXPERT_NAMES, parts, strict=True):
        y = x
        if config.mogle.has_expert:
            with g.scope(expert):
                hidden = g.node("Relu", g.linear(g.reshape(x, (-1, C)), f"mogle.{expert}.net.0"))
                y = g.reshape(g.linear(hidden, f"mogle.{expert}.net.2"), shape)
        outputs.append(y)
    bank = g.node("Transpose", g.concat(outputs, axis=1), perm=[0, 2, 1, 3])
    if not config.mogle.has_gating:
        bank = g.node("ReduceSum", bank, g.const([2]), keepdims=1)
        g.output(bank, "bank", ("batch", "tokens", 1, C))
        return g.model()
    g.output(bank, "bank", ("batch", "tokens", NUM_EXPERTS, C))
    gate_input = g.add(g.node("Squeeze", parts[0], g.const([1])), g.weight("mogle.gating.noise_proj.bias"))
    g.output(gate_input, "gate_input", ("batch", "tokens", C))
    return g.model()


class PrepareGraph:
    """Builds the graph that makes all other inputs of the step.

    Args:
        builder: an empty graph.
        config: the bundle's shapes.
        model: the reference's switches.
    """

    def __init__(self, builder: GraphBuilder, config: BundleConfig, model: ModelConfig) -> None:
        self.g, self.config, self.t, self.model = builder, config, config.transformer, model

    def build(self) -> onnx.ModelProto:
        """Build the whole graph. `mogle_rt.engines.manifest` describes its inputs and outputs."""
        g, t = self.g, self.t
        D = t.width
        prompt = g.input("prompt_embeds", ("batch", "text_tokens", t.joint_attention_dim))
        pooled = g.input("pooled_prompt_embeds", ("batch", t.pooled_projection_dim))
        model_timesteps = g.input("model_timesteps", ("steps",), torch.float32)
        timesteps = g.input("timesteps", ("steps",), torch.float32) if self.config.mogle.has_gating else ""
        guidance = g.input("guidance", (1,), torch.float32) if t.guidance_embeds else None
        g.input("grid", (2,), torch.int64)
        g.input("position_delta", (2,), torch.float32)
        g.input("position_scale", (1,), torch.float32)

        with g.scope("text"):
            flat = g.linear(g.reshape(prompt, (-1, t.joint_attention_dim)), "transformer.context_embedder")
            text = g.reshape(flat, g.ints(g.size(prompt, 0), g.size(prompt, 1), D))
        g.output(text, "text", ("batch", "text_tokens", D))
        if self.config.mogle.has_gating:
            with g.scope("gate_time"):
                layer = "mogle.gating.timestep_embedding"
                sinusoid = self._sinusoid(timesteps, t.in_channels)
                table = g.linear(g.silu(g.linear(sinusoid, f"{layer}.linear_1")), f"{layer}.linear_2")
            g.output(table, "time_table", ("steps", t.in_channels))
        with g.scope("modulation"):
            self._modulation(model_timesteps, guidance, pooled)
        with g.scope("rope"):
            self._rope(g.size(prompt, 1))
        return g.model()

    def _sinusoid(self, times: str, channels: int) -> str:
        """Sinusoids of times: float32 [S] -> [S, channels] in the graph's dtype, with the cosines first."""
        g, half = self.g, channels // 2
        exponent = -math.log(SINUSOID_PERIOD) * torch.arange(half, dtype=torch.float32) / half
        angles = g.mul(g.node("Unsqueeze", times, g.const([1])), g.const(exponent.exp().numpy(), torch.float32))
        return g.from_float32(g.concat([g.node("Cos", angles), g.node("Sin", angles)], axis=1))

    def _mlp(self, x: str, name: str) -> str:
        layer = f"transformer.time_text_embed.{name}"
        return self.g.linear(self.g.silu(self.g.linear(x, f"{layer}.linear_1")), f"{layer}.linear_2")

    def _modulation(self, times: str, guidance: str | None, pooled: str) -> None:
        """The table of all steps [S, B, R, D], and that of the condition [B, R, D], whose timestep is always 0."""
        g, t, D = self.g, self.t, self.t.width
        constant = self._mlp(pooled, "text_embedder")  # [B, D]
        if guidance is not None:
            constant = g.add(constant, self._mlp(self._sinusoid(guidance, SINUSOID_DIM), "guidance_embedder"))
        every = g.concat([times, g.const([0.0], torch.float32)], axis=0)
        embedded = self._mlp(self._sinusoid(every, SINUSOID_DIM), "timestep_embedder")  # [S + 1, D]
        activated = g.silu(g.add(g.node("Unsqueeze", embedded, g.const([1])), constant))  # [S + 1, B, D]
        steps, batch = g.size(times, 0), g.size(pooled, 0)
        rows = g.reshape(g.rows(activated, 0, steps, axis=0), (-1, D))
        condition = g.reshape(g.rows(activated, steps, g.add(steps, g.const([1])), axis=0), (-1, D))

        parts: list[str] = []
        condition_parts: list[str] = []
        shapes = {n: g.ints(steps, batch, n, D) for n in (6, 3, 2)}
        condition_shapes = {n: g.ints(batch, n, D) for n in (6, 3)}

        def add(layer: str, count: int, *, branch: bool) -> None:
            with g.scope(layer):
                lora = f"lora.{layer}" if branch and self.model.latent_lora else None
                parts.append(g.reshape(g.linear(rows, f"transformer.{layer}", lora=lora), shapes[count]))
                if branch:
                    y = g.linear(condition, f"transformer.{layer}", lora=f"lora.{layer}")
                    condition_parts.append(g.reshape(y, condition_shapes[count]))

        for i in range(t.num_layers):
            add(f"transformer_blocks.{i}.norm1.linear", 6, branch=True)
        for i in range(t.num_layers):
            add(f"transformer_blocks.{i}.norm1_context.linear", 6, branch=False)
        for i in range(t.num_single_layers):
            add(f"single_transformer_blocks.{i}.norm.linear", 3, branch=True)
        add("norm_out.linear", 2, branch=False)

        def finish(parts: list[str], names: list[str], axis: int) -> str:
            ones = [[float(name.endswith((".1", ".4", "out.scale")))] for name in names]
            return g.add(g.concat(parts, axis=axis), g.const(np.array(ones, dtype=np.float32)))

        names, condition_names = modulation_row_names(t), condition_row_names(t)
        g.output(finish(parts, names, 2), "modulation", ("steps", "batch", len(names), D))
        if condition_names:
            table = finish(condition_parts, condition_names, 1)
            g.output(table, "condition_modulation", ("batch", len(condition_names), D))

    def _rope(self, text_tokens: str) -> None:
        """Cosines and sines of the joint sequence, float32 [T + 2 N, d / 2]. Angles are float64, as in the reference."""
        g, double = self.g, torch.float64
        grid = g.nodes_of("Split", ["grid"], 2, axis=0, num_outputs=2)
        columns = grid[1]
        zero, one, squeeze = g.const(0), g.const(1), g.const([0])
        count = g.node("Squeeze", g.mul(*grid), squeeze)
        cells = g.node("Range", zero, count, one)
        image = [
            g.cast(g.node("Div", cells, columns), torch.float32),
            g.cast(g.node("Mod", cells, columns), torch.float32),
        ]
        deltas = g.nodes_of("Split", ["position_delta"], 2, axis=0, num_outputs=2)
        half = g.mul(g.node("Sub", "position_scale", g.const([1.0], torch.float32)), g.const([0.5], torch.float32))
        text = g.node("Expand", g.const([0.0], torch.float32), text_tokens)
        still = g.node("Expand", g.const([0.0], torch.float32), g.add(text_tokens, g.mul(g.mul(*grid), g.const([2]))))
        axes = [still]
        for ids, delta in zip(image, deltas, strict=True):
            moved = g.add(g.mul(g.add(ids, delta), "position_scale"), half)
            axes.append(g.concat([text, ids, moved], axis=0))
        angles = []
        for dim, ids in zip(self.t.axes_dims_rope, axes, strict=True):
            exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            frequencies = (1.0 / (ROPE_THETA**exponents)).numpy()
            precise = g.node("Unsqueeze", g.cast(ids, double), g.const([1]))
            angles.append(g.mul(precise, g.const(frequencies, double)))
        joined = g.concat(angles, axis=1)
        # onnxruntime had no cosine of float64 before 1.29, but it had the sine: cos(a) = sin(a + π / 2).
        quarter = g.add(joined, g.const(np.array(math.pi / 2), double))
        for name, angle in (("rope_cos", quarter), ("rope_sin", joined)):
            table = g.cast(g.node("Sin", angle), torch.float32)
            g.output(table, name, ("sequence", self.t.attention_head_dim // 2), torch.float32)
