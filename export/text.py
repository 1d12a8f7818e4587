"""The text encoders of the transformers library as graphs: CLIP's tokens to its vector, T5's tokens to its sequence.

Both take every token as it is given, padding included, as `mogle_rt.encoders.text` does: there is no attention mask.
CLIP's tokens see only those before them, so that padding behind the end of a text changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle, BundleConfig
from mogle_rt.bundle.schema import check_names
from mogle_rt.encoders.text_models import text_encoder_shapes
from mogle_rt.errors import CheckpointError
from mogle_rt.export.graph import GraphBuilder

CLIP, T5 = TEXT_GRAPHS = ("text_encoder", "text_encoder_2")
OLD_END_TOKEN = 2  # of CLIP configurations that name a wrong one; transformers then takes the largest number's place


class TextGraph:
    """Builds the graph of CLIP's text encoder, or of T5's.

    Args:
        builder: an empty graph.
        config: of the bundle, which holds text encoders.
        part: `CLIP` or `T5`.

    Raises:
        CheckpointError: the bundle has no such encoder, or one with an activation that can't be exported.
    """

    def __init__(self, builder: GraphBuilder, config: BundleConfig, part: str) -> None:
        values: Mapping[str, Any] | None = getattr(config, part)
        if values is None:
            raise CheckpointError(f"the bundle holds no {part}, so it can't be exported")
        self.g, self.values, self.part = builder, values, part
        older = f"{part}.text_model.final_layer_norm.weight" in builder.weights.tensors
        self.prefix = f"{part}.text_model" if older else part

    def build(self) -> onnx.ModelProto:
        """Build the whole graph. `mogle_rt.engines.manifest` describes its inputs and outputs."""
        return self._build_clip() if self.part == CLIP else self._build_t5()

    # Of both. x is [B * L, width], the rows of the tokens of all texts.

    def _tokens(self, name: str, table: str) -> str:
        """Declare the tokens' numbers as an input, and look up their rows in a table."""
        self.ids = self.g.input(name, ("batch", "text_tokens"), torch.int64)
        self.batch, self.length = self.g.size(self.ids, 0), self.g.size(self.ids, 1)
        return self.g.looked_up(table, self.ids)

    def _attention(self, parts: list[str], heads: int, size: int, bias: str, scale: float | None = None) -> str:
        """Attention within each text; parts: the rows of query, key and value."""
        shape = self.g.ints(self.batch, self.length, heads * size)
        q, k, v = (self.g.reshape(part, shape) for part in parts)
        return self.g.reshape(self.g.attention(q, k, v, heads, size, bias, scale=scale), (-1, heads * size))

    def _setting(self, name: str, default: Any) -> Any:
        """A value of the configuration, or transformers' default of this encoder."""
        return self.values.get(name, default)

    def _linear(self, rows: str, layer: str, *, bias: bool = False, dtype: torch.dtype | None = None) -> str:
        """Apply a layer to rows. dtype: of the product and its result, if it is not the graph's."""
        name = f"{self.prefix}.{layer}"
        weight = self.g.weight(f"{name}.weight", dtype)
        return self.g.gemm(rows, weight, self.g.weight(f"{name}.bias", dtype) if bias else None)

    def _count(self, name: str, default: int) -> int:
        return int(self._setting(name, default))

    def _activation(self, x: str, name: str) -> str:
        g = self.g
        if name in ("gelu_new", "gelu_pytorch_tanh"):
            return g.gelu(x)
        if name == "quick_gelu":
            return g.mul(x, g.node("Sigmoid", g.mul(x, g.const(1.702))))
        if name == "gelu":
            half = g.mul(x, g.const(0.5))
            return g.mul(half, g.add(g.but_bfloat16("Erf", g.mul(x, g.const(math.sqrt(0.5)))), g.const(1.0)))
        if name == "relu":
            return g.node("Relu", x)
        if name == "silu":
            return g.silu(x)
        raise CheckpointError(f"{self.part}: the activation {name!r} can't be exported")

    # CLIP

    def _build_clip(self) -> onnx.ModelProto:
        g, width = self.g, self._count("hidden_size", 512)
        heads = self._count("num_attention_heads", 8)
        embeddings = f"{self.prefix}.embeddings"
        x = self._tokens("clip_ids", f"{embeddings}.token_embedding.weight")
        places = g.rows(g.weight(f"{embeddings}.position_embedding.weight"), 0, self.length, axis=0)
        x = g.reshape(g.add(x, places), (-1, width))
        later = g.node("Expand", g.const(-math.inf, torch.float32), g.ints(self.length, self.length))
        causal = g.node("Trilu", later, g.const(1), upper=1)  # [L, L], -inf where a token would see a later one
        for i in range(self._count("num_hidden_layers", 12)):
            layer = f"encoder.layers.{i}"
            with g.scope(layer):
                y = self._norm(x, f"{layer}.layer_norm1")
                parts = [self._linear(y, f"{layer}.self_attn.{n}_proj", bias=True) for n in "qkv"]
                y = self._attention(parts, heads, width // heads, causal)
                x = g.add(x, self._linear(y, f"{layer}.self_attn.out_proj", bias=True))
                y = self._linear(self._norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1", bias=True)
                y = self._activation(y, self._setting("hidden_act", "quick_gelu"))
                x = g.add(x, self._linear(y, f"{layer}.mlp.fc2", bias=True))
        x = g.node("Gather", self._norm(x, "final_layer_norm"), self._ends(), axis=0)
        g.output(x, "pooled_prompt_embeds", ("batch", width))
        return g.model()

    def _ends(self) -> str:
        """The number of the row of each text's first end token, int64 [B]."""
        g, end = self.g, self._count("eos_token_id", 49407)
        found = self.ids if end == OLD_END_TOKEN else g.node("Equal", self.ids, g.const(end))
        place = g.node("ArgMax", g.cast(found, torch.float32), axis=1, keepdims=0)
        texts = g.node("Range", g.const(0), g.node("Squeeze", self.batch, g.const([0])), g.const(1))
        return g.add(g.mul(texts, self.length), place)

    def _norm(self, x: str, layer: str) -> str:
        g = self.g
        weights = (g.weight(f"{self.prefix}.{layer}.{kind}") for kind in ("weight", "bias"))
        epsilon = float(self._setting("layer_norm_eps", 1e-5))
        return g.node("LayerNormalization", x, *weights, axis=-1, epsilon=epsilon)

    # T5

    def _build_t5(self) -> onnx.ModelProto:
        """In float16 the residual stream and the last product of each MLP are float32, as they are in transformers."""
        g = self.g
        self.residual = torch.float32 if g.dtype == torch.float16 else g.dtype
        heads, size = self._count("num_heads", 8), self._count("d_kv", 64)
        width = self._count("d_model", 512)
        x = self._tokens("t5_ids", f"{self.part}.shared.weight")
        x = self._to_residual(g.reshape(x, (-1, width)))
        with g.scope("position_bias"):
            bias = self._position_bias()
        for i in range(self._count("num_layers", 6)):
            layer = f"encoder.block.{i}.layer"
            with g.scope(layer):
                y = self._rms_norm(x, f"{layer}.0.layer_norm")
                parts = [self._linear(y, f"{layer}.0.SelfAttention.{n}") for n in "qkv"]
                y = self._attention(parts, heads, size, bias, scale=1.0)
                x = g.add(x, self._to_residual(self._linear(y, f"{layer}.0.SelfAttention.o")))
                x = g.add(x, self._mlp(self._rms_norm(x, f"{layer}.1.layer_norm"), f"{layer}.1.DenseReluDense"))
        shape = g.ints(self.batch, self.length, width)
        out = g.reshape(self._rms_norm(x, "encoder.final_layer_norm"), shape)
        g.output(out, "prompt_embeds", ("batch", "text_tokens", width))
        return g.model()

    def _mlp(self, x: str, layer: str) -> str:
        kind = str(self._setting("feed_forward_proj", "relu"))
        gated, _, name = kind.rpartition("-")
        act = "gelu_new" if kind == "gated-gelu" else name
        if gated:
            y = self._activation(self._linear(x, f"{layer}.wi_0"), act)
            y = self.g.mul(y, self._linear(x, f"{layer}.wi_1"))
        else:
            y = self._activation(self._linear(x, f"{layer}.wi"), act)
        return self._linear(self._to_residual(y), f"{layer}.wo", dtype=self.residual)

    def _to_residual(self, x: str) -> str:
        return x if self.residual == self.g.dtype else self.g.cast(x, self.residual)

    def _rms_norm(self, x: str, layer: str) -> str:
        epsilon = float(self._setting("layer_norm_epsilon", 1e-6))
        weight = self.g.weight(f"{self.prefix}.{layer}.weight")
        return self.g.rms_norm(x, weight, epsilon, dtype=self.residual)

    def _position_bias(self) -> str:
        """What is added to the attention's scores, float32 [1, H, L, L]; it depends on the distance of two tokens."""
        g = self.g
        count = self._count("relative_attention_num_buckets", 32)
        furthest = self._count("relative_attention_max_distance", 128)
        places = g.node("Range", g.const(0), g.node("Squeeze", self.length, g.const([0])), g.const(1))
        seen, seeing = (g.node("Unsqueeze", places, g.const([axis])) for axis in (0, 1))
        distance = g.node("Sub", seen, seeing)  # [L, L]
        near = g.node("Min", g.node("Abs", distance), g.const(furthest))
        bucket = g.node("Gather", g.const(distance_buckets(count, furthest).numpy()), near, axis=0)
        behind = g.cast(g.node("Greater", distance, g.const(0)), torch.int64)
        bucket = g.add(bucket, g.mul(behind, g.const(count // 2)))
        values = g.looked_up(
            f"{self.part}.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", bucket
        )
        return g.to_float32(g.node("Unsqueeze", g.node("Transpose", values, perm=[2, 0, 1]), g.const([0])))


def require_text_encoders(bundle: Bundle) -> None:
    """Check that a bundle holds text encoders, with all tensors that their configurations ask for.

    Raises:
        CheckpointError: it doesn't.
    """
    if not bundle.has_text_encoders:
        raise CheckpointError(f"{bundle.path}: holds no text encoders to export")
    for part in TEXT_GRAPHS:
        found = {name: bundle.tensors[f"{part}.{name}"].shape for name in bundle.names(part)}
        check_names(found, text_encoder_shapes(part, getattr(bundle.config, part), found), part)


def distance_buckets(count: int, furthest: int) -> Tensor:
    """The bucket of each distance from 0 to ``furthest``, by T5's formula in float32: int64 [furthest + 1].

    Each direction has half of the ``count`` buckets. The first half of those hold one distance each; the distances in the
    others grow logarithmically.

    Raises:
        CheckpointError: the furthest distance is one of those that have a bucket of their own.
    """
    each = count // 2
    single = each // 2
    if furthest <= single:
        raise CheckpointError(
            f"text_encoder_2: relative_attention_max_distance must be more than {single}, got {furthest}"
        )
    distances = torch.arange(furthest + 1)
    steps = torch.log(distances.clamp_min(1).float() / single) / math.log(furthest / single) * (each - single)
    large = (single + steps.to(torch.int64)).clamp_max(each - 1)
    return torch.where(distances < single, distances, large)
