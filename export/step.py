"""The graph of a step: gate and mixture, and then FLUX with a condition branch.

Text, image and condition are separate streams, each a block of rows, and meet in attention only. The branch LoRA is two
small products whose result is added to that of the base weight, so the base weights stay as they are in the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx
import torch

from mogle_rt.bundle.bundle import BundleConfig
from mogle_rt.config import MLP_RATIO, NUM_EXPERTS, ModelConfig
from mogle_rt.export.graph import GraphBuilder
from mogle_rt.export.prepare import condition_row_names, modulation_row_names
from mogle_rt.ops.attention import Visibility


@dataclass(frozen=True)
class Stream:
    """Rows that share weights and modulation.

    Attributes:
        x: [B, rows, D].
        count: the number of rows, int64 [1].
        lora: whether the branch LoRA acts on these rows.
    """

    x: str
    count: str
    lora: bool = False


@dataclass(frozen=True)
class Projected:
    """Query, key and value of a stream, [B, rows, D] each. Query and key are normalised already."""

    q: str
    k: str
    v: str


class StepGraph:
    """Builds the graph of a step.

    Args:
        builder: an empty graph.
        config: the bundle's shapes.
        model: the reference's switches.
        scaled: whether attention uses ``log_condition_scale``, which is then an input.
    """

    def __init__(self, builder: GraphBuilder, config: BundleConfig, model: ModelConfig, *, scaled: bool) -> None:
        self.g, self.config, self.model = builder, config, model
        self.t = config.transformer
        self.heads, self.head_size = self.t.num_attention_heads, self.t.attention_head_dim
        self.visibility = Visibility.SCALED if scaled else Visibility.of(model, 1.0)

    def build(self) -> onnx.ModelProto:
        """Build the whole graph. `mogle_rt.engines.manifest` describes its inputs and outputs."""
        g, t, C, D = self.g, self.t, self.t.in_channels, self.t.width
        latents = g.input("latents", ("batch", "tokens", C))
        step = g.input("step", (1,), torch.int64)
        g.input("bank", ("batch", "tokens", NUM_EXPERTS if self.config.mogle.has_gating else 1, C))
        if self.config.mogle.has_gating:
            g.input("gate_input", ("batch", "tokens", C))
            g.input("time_table", ("steps", C))
        text = g.input("text", ("batch", "text_tokens", D))
        rows, condition_rows = modulation_row_names(t), condition_row_names(t)
        table = g.input("modulation", ("steps", "batch", len(rows), D))
        condition_table = g.input("condition_modulation", ("batch", len(condition_rows), D)) if condition_rows else ""
        cos, sin = (g.input(f"rope_{f}", ("sequence", self.head_size // 2), torch.float32) for f in ("cos", "sin"))
        if self.visibility is Visibility.SCALED:
            g.input("log_condition_scale", (1,), torch.float32)

        with g.scope("condition"):
            condition = self._condition(latents, step)
        with g.scope("modulation"):
            now = g.node("Squeeze", g.node("Gather", table, step, axis=0), g.const([0]))
            self.rows = self._rows(rows, now)
            self.condition_rows = self._rows(condition_rows, condition_table)
        with g.scope("shapes"):
            self.batch = g.size(latents, 0)
            self.image, self.text = g.size(latents, 1), g.size(text, 1)
            self.rest = g.add(self.text, self.image)
            self.total = g.add(self.rest, self.image)
            batched = [g.node("Unsqueeze", f, g.const([0])) for f in (cos, sin)]
            shape = g.ints(self.batch, self.total, self.head_size // 2)
            self.rope = [g.node("Expand", f, shape) for f in batched]
        if self.visibility is Visibility.SCALED:
            with g.scope("condition_scale"):
                self._biases()

        streams = {
            "text": Stream(text, self.text),
            "image": Stream(latents, self.image, lora=self.model.latent_lora),
            "condition": Stream(condition, self.image, lora=True),
        }
        for name in ("image", "condition"):
            with g.scope(f"x_embedder/{name}"):
                s = streams[name]
                streams[name] = replace(s, x=self._linear(s, s.x, C, "x_embedder"))
        for i in range(t.num_layers):
            with g.scope(f"transformer_blocks.{i}"):
                streams = self._double(i, streams)
        image = streams["image"].x
        if t.num_single_layers:
            image = self._singles(streams)
        with g.scope("out"):
            scale, shift = self.rows["out.scale"], self.rows["out.shift"]
            normed = g.norm_modulate(image, scale, shift, D)
            velocity = self._linear(Stream(image, self.image), normed, D, "proj_out", lora=False)
        g.output(velocity, "velocity", ("batch", "tokens", C))
        g.output(condition, "condition", ("batch", "tokens", C))
        return g.model()

    def _rows(self, names: Sequence[str], table: str) -> dict[str, str]:
        """Split a table [B, R, D] into its rows, [B, 1, D] each, by name."""
        if not names:
            return {}
        return dict(
            zip(names, self.g.nodes_of("Split", [table], len(names), axis=1, num_outputs=len(names)), strict=True)
        )

    def _condition(self, latents: str, step: str) -> str:
        """The condition tokens of the step, [B, N, C]."""
        g, C = self.g, self.t.in_channels
        if not self.config.mogle.has_gating:
            return g.node("Squeeze", "bank", g.const([2]))
        gating = "mogle.gating"
        shape = g.node("Shape", latents)
        h = g.reshape(g.linear(g.reshape(latents, (-1, C)), f"{gating}.noise_proj", bias=False), shape)
        h = g.add(g.add(h, "gate_input"), g.node("Gather", "time_table", step, axis=0))
        hidden = g.node("Relu", g.linear(g.reshape(h, (-1, C)), f"{gating}.gate.0"))
        weights = g.node("Softmax", g.linear(hidden, f"{gating}.gate.2"), axis=-1)
        weights = g.reshape(weights, g.ints(g.size(latents, 0), g.size(latents, 1), 1, NUM_EXPERTS))
        if self.model.weight_is_scale:
            weights = g.but_bfloat16("ReduceMean", weights, g.const([1]), keepdims=1)
        return g.node("Squeeze", g.node("MatMul", weights, "bank"), g.const([2]))

    def _biases(self) -> None:
        """Make the biases of the scores, float32 [L], one number for each key.

        One bias is for queries of text and image (the rest), the other for queries of the condition.
        """
        g = self.g
        scale, zero = "log_condition_scale", g.const([0.0], torch.float32)

        def over(rest: str, condition: str) -> str:
            parts = (g.node("Expand", rest, self.rest), g.node("Expand", condition, self.image))
            return g.concat(parts, axis=0)

        self.rest_bias, self.condition_bias = over(zero, scale), over(scale, zero)

    # Layers

    def _linear(self, stream: Stream, x: str, width: int, layer: str, lora: bool | None = None) -> str:
        """Apply a layer to the rows of a stream: [B, rows, width] -> [B, rows, out]."""
        flat = self.g.reshape(x, (-1, width))
        return self._linears(stream, flat, [layer], lora)[0]

    def _linears(self, stream: Stream, flat: str, layers: Sequence[str], lora: bool | None = None) -> list[str]:
        """Apply several layers to the same rows [B * rows, in]."""
        g, with_lora = self.g, stream.lora if lora is None else lora
        results = []
        for layer in layers:
            with g.scope(layer.rpartition("blocks.")[2].partition(".")[2] or layer):
                branch = f"lora.{layer}" if with_lora else None
                y = g.linear(flat, f"transformer.{layer}", lora=branch)
                # The width must be a number, because TensorRT needs to know it when it builds.
                shape = g.ints(self.batch, stream.count, g.weights.tensors[f"transformer.{layer}.weight"].shape[0])
                results.append(g.reshape(y, shape))
        return results

    def _norm_heads(self, x: str, weight: str) -> str:
        """RMSNorm of every head: [B, rows, D] -> [B, rows, D]."""
        g = self.g
        heads = g.reshape(x, (0, 0, self.heads, self.head_size))
        return g.reshape(g.rms_norm(heads, g.weight(f"transformer.{weight}.weight")), (0, 0, self.t.width))

    def _project(self, stream: Stream, normed: str, layers: Sequence[str], norms: Sequence[str]) -> Projected:
        """Query, key and value. normed: [B * rows, D]."""
        q, k, v = self._linears(stream, normed, layers)
        return Projected(self._norm_heads(q, norms[0]), self._norm_heads(k, norms[1]), v)

    def _rotate(self, x: str, start: str | int = 0, end: str | None = None) -> str:
        """Apply RoPE to x, which holds rows start to end of the joint sequence; by default all of them."""
        tables = self.rope if end is None else [self.g.rows(t, start, end) for t in self.rope]
        return self.g.rope(x, (tables[0], tables[1]), self.heads, self.head_size)

    def _attend(self, q: str, k: str, v: str, *, image_only: bool = False) -> tuple[str, str | None]:
        """Joint attention of rotated q, k, v in the order [text, image, condition], computed group by group.

        The result is the attention of the queries of text and image (the rest), and that of the condition's queries. If
        all tokens see each other, one call computes both; then the first result has all rows and the second is None.
        With ``image_only``, q holds image rows only, and the second result is None as well.
        """
        g, H, d = self.g, self.heads, self.head_size
        if self.visibility is Visibility.JOINT:
            return g.attention(q, k, v, H, d), None
        rest_q = q if image_only else g.rows(q, 0, self.rest)
        if self.visibility is Visibility.SCALED:
            rest = g.attention(rest_q, k, v, H, d, self.rest_bias)
        elif self.visibility is Visibility.INDEPENDENT:
            rest = g.attention(rest_q, k, v, H, d)
        else:
            rest = g.attention(rest_q, g.rows(k, 0, self.rest), g.rows(v, 0, self.rest), H, d)
        if image_only:
            return rest, None
        own_q, own_k, own_v = (g.rows(x, self.rest, self.total) for x in (q, k, v))
        if self.visibility is Visibility.SCALED:
            return rest, g.attention(own_q, k, v, H, d, self.condition_bias)
        return rest, g.attention(own_q, own_k, own_v, H, d)

    # Blocks

    def _double(self, i: int, streams: dict[str, Stream]) -> dict[str, Stream]:
        g, D, block = self.g, self.t.width, f"transformer_blocks.{i}"
        names = list(streams)  # text, image, condition, which is the order of the joint sequence
        mods = {
            "text": self._modulation(self.rows, f"context.{i}", 6),
            "image": self._modulation(self.rows, f"double.{i}", 6),
            "condition": self._modulation(self.condition_rows, f"double.{i}", 6),
        }
        layers: dict[str, tuple[list[str], list[str], str, str, str]] = {}
        for name in names:
            own = name == "text"
            layers[name] = (
                [f"{block}.attn.add_{x}_proj" if own else f"{block}.attn.to_{x}" for x in "qkv"],
                [f"{block}.attn.norm_added_{x}" if own else f"{block}.attn.norm_{x}" for x in "qk"],
                f"{block}.attn.to_add_out" if own else f"{block}.attn.to_out.0",
                f"{block}.ff_context.net.0.proj" if own else f"{block}.ff.net.0.proj",
                f"{block}.ff_context.net.2" if own else f"{block}.ff.net.2",
            )
        projected = []
        for name, s in streams.items():
            with g.scope(name):
                shift, scale = mods[name][:2]
                normed = g.reshape(g.norm_modulate(s.x, scale, shift, D), (-1, D))
                projected.append(self._project(s, normed, layers[name][0], layers[name][1]))
        with g.scope("attention"):
            q = self._rotate(g.concat([p.q for p in projected], axis=1))
            k = self._rotate(g.concat([p.k for p in projected], axis=1))
            v = g.concat([p.v for p in projected], axis=1)
            rest, condition = self._attend(q, k, v)
            attention = {
                "text": g.rows(rest, 0, self.text),
                "image": g.rows(rest, self.text, self.rest),
                "condition": g.rows(rest, self.rest, self.total) if condition is None else condition,
            }
        outputs = {}
        for name, s in streams.items():
            with g.scope(name):
                outputs[name] = self._linear(s, attention[name], D, layers[name][2])
        result = {}
        for name, s in streams.items():
            with g.scope(name):
                _, _, gate, shift, scale, mlp_gate = mods[name]
                x = g.gated(s.x, gate, outputs[name])
                if name == "image" and self.model.add_cond_attn:
                    x = g.gated(x, mods["condition"][2], outputs["condition"])
                normed = g.norm_modulate(x, scale, shift, D)
                hidden = g.gelu(self._linear(s, normed, D, layers[name][3], lora=False))
                y = self._linear(s, hidden, MLP_RATIO * D, layers[name][4])
                result[name] = replace(s, x=g.clip(g.gated(x, mlp_gate, y)))
        return result

    def _modulation(self, rows: dict[str, str], name: str, count: int) -> list[str]:
        return [rows[f"{name}.{j}"] for j in range(count)]

    def _singles(self, streams: dict[str, Stream]) -> str:
        """All single blocks. Text and image are one stream in them. Returns the image rows [B, N, D]."""
        g = self.g
        with g.scope("join"):
            rest = Stream(
                g.concat([streams["text"].x, streams["image"].x], axis=1),
                self.rest,
                lora=self.model.latent_lora,
            )
        condition, last = streams["condition"], self.t.num_single_layers - 1
        for i in range(last):
            with g.scope(f"single_transformer_blocks.{i}"):
                rest, condition = self._single(i, rest, condition)
        with g.scope(f"single_transformer_blocks.{last}"):
            return self._last_single(last, rest, condition)

    def _single(self, i: int, rest: Stream, condition: Stream) -> tuple[Stream, Stream]:
        g, D, block = self.g, self.t.width, f"single_transformer_blocks.{i}"
        streams = (rest, condition)
        scopes = ("rest", "condition")
        mods = [self._modulation(rows, f"single.{i}", 3) for rows in (self.rows, self.condition_rows)]
        projected, hidden = [], []
        for name, s, (shift, scale, _) in zip(scopes, streams, mods, strict=True):
            with g.scope(name):
                normed = g.reshape(g.norm_modulate(s.x, scale, shift, D), (-1, D))
                projected.append(self._project(s, normed, self._qkv(block), self._norms(block)))
                hidden.append(g.gelu(self._linears(s, normed, [f"{block}.proj_mlp"])[0]))
        with g.scope("attention"):
            q = self._rotate(g.concat([p.q for p in projected], axis=1))
            k = self._rotate(g.concat([p.k for p in projected], axis=1))
            v = g.concat([p.v for p in projected], axis=1)
            rest_out, condition_out = self._attend(q, k, v)
            if condition_out is None:
                attention = [g.rows(rest_out, 0, self.rest), g.rows(rest_out, self.rest, self.total)]
            else:
                attention = [rest_out, condition_out]
        results = []
        for name, s, mod, a, h in zip(scopes, streams, mods, attention, hidden, strict=True):
            with g.scope(name):
                y = self._linear(s, g.concat([a, h], axis=2), (1 + MLP_RATIO) * D, f"{block}.proj_out")
                results.append(replace(s, x=g.clip(g.gated(s.x, mod[2], y))))
        return results[0], results[1]

    def _last_single(self, i: int, rest: Stream, condition: Stream) -> str:
        """The last block, image rows [B, N, D]. It needs keys and values of all rows, but the rest of image rows only."""
        g, D, block = self.g, self.t.width, f"single_transformer_blocks.{i}"
        mods = [self._modulation(rows, f"single.{i}", 3) for rows in (self.rows, self.condition_rows)]
        keys, values, normed_rest = [], [], ""
        _, k_layer, v_layer = self._qkv(block)
        q_norm, k_norm = self._norms(block)
        for name, s, (shift, scale, _) in zip(("rest", "condition"), (rest, condition), mods, strict=True):
            with g.scope(name):
                normed = g.norm_modulate(s.x, scale, shift, D)
                normed_rest = normed_rest or normed
                k, v = self._linears(s, g.reshape(normed, (-1, D)), [k_layer, v_layer])
                keys.append(self._norm_heads(k, k_norm))
                values.append(v)
        image = Stream(g.rows(rest.x, self.text, self.rest), self.image, rest.lora)
        with g.scope("image"):
            flat = g.reshape(g.rows(normed_rest, self.text, self.rest), (-1, D))
            q, hidden = self._linears(image, flat, [self._qkv(block)[0], f"{block}.proj_mlp"])
            q = self._rotate(self._norm_heads(q, q_norm), self.text, self.rest)
        with g.scope("attention"):
            k = self._rotate(g.concat(keys, axis=1))
            attention, _ = self._attend(q, k, g.concat(values, axis=1), image_only=True)
        with g.scope("image"):
            joined = g.concat([attention, g.gelu(hidden)], axis=2)
            y = self._linear(image, joined, (1 + MLP_RATIO) * D, f"{block}.proj_out")
            return g.clip(g.gated(image.x, mods[0][2], y))

    @staticmethod
    def _qkv(block: str) -> list[str]:
        return [f"{block}.attn.to_{x}" for x in "qkv"]

    @staticmethod
    def _norms(block: str) -> list[str]:
        return [f"{block}.attn.norm_{x}" for x in "qk"]
