"""FLUX's VAE (diffusers' AutoencoderKL) as two graphs: pictures to packed latents, and packed latents to images."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch

from mogle_rt.bundle.bundle import BundleConfig
from mogle_rt.errors import CheckpointError
from mogle_rt.export.graph import GraphBuilder

NORM_EPS = 1e-6


class VaeGraph:
    """Builds the encoder or the decoder.

    Args:
        builder: an empty graph.
        config: of the bundle. Its VAE must consist of plain residual blocks, as FLUX's does.

    Raises:
        CheckpointError: the VAE has blocks or activations that can't be exported.
    """

    def __init__(self, builder: GraphBuilder, config: BundleConfig) -> None:
        self.g, self.vae = builder, config.vae
        self.groups = int(self._setting("norm_num_groups", 32))
        self.latent_channels = int(self._setting("latent_channels", 4))
        for name, known in (
            ("act_fn", "silu"),
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            value = self._setting(name, known)
            if set([value] if isinstance(value, str) else value) != {known}:
                raise CheckpointError(f"vae: {name} must be {known} to be exported, got {value!r}")

    def _setting(self, name: str, default: Any) -> Any:
        return self.vae.get(name, default)

    def build_encoder(self) -> onnx.ModelProto:
        """Pictures -> the mean of their posterior, scaled and packed, as `mogle_rt.engines.manifest` describes."""
        g, C = self.g, self.latent_channels
        pictures = g.input("pictures", ("pictures", "height", "width", 3), torch.uint8)
        x = g.node("Transpose", g.cast(pictures, g.dtype), perm=[0, 3, 1, 2])
        x = g.node("Sub", g.mul(g.node("Div", x, g.const(255.0)), g.const(2.0)), g.const(1.0))
        x = self._conv(x, "encoder.conv_in")
        for i in range(len(self.vae["block_out_channels"])):
            block = f"encoder.down_blocks.{i}"
            x = self._resnets(x, block)
            if self._has(f"{block}.downsamplers.0.conv"):
                x = self._conv(x, f"{block}.downsamplers.0.conv", pads=(0, 0, 1, 1), stride=2)
        x = self._conv_out(self._middle(x, "encoder.mid_block"), "encoder")
        if self._has("quant_conv"):
            x = self._conv(x, "quant_conv", pads=(0, 0, 0, 0))
        mean = g.rows(x, 0, C)
        shift, scale = g.const(float(self.vae["shift_factor"])), g.const(float(self.vae["scaling_factor"]))
        z = g.mul(g.node("Sub", mean, shift), scale)
        h, w = (g.node("Div", g.size(z, axis), g.const([2])) for axis in (2, 3))
        cells = g.node("Transpose", g.reshape(z, g.ints(g.size(z, 0), C, h, 2, w, 2)), perm=[0, 2, 4, 1, 3, 5])
        packed = g.reshape(cells, g.ints(g.size(z, 0), g.mul(h, w), 4 * C))
        g.output(packed, "latents", ("pictures", "tokens", 4 * C))
        return g.model()

    def build_decoder(self) -> onnx.ModelProto:
        """Packed latents -> images in [0, 1], as `mogle_rt.engines.manifest` describes."""
        g, C = self.g, self.latent_channels
        latents = g.input("latents", ("batch", "tokens", 4 * C))
        rows, columns = g.nodes_of("Split", [g.input("grid", (2,), torch.int64)], 2, axis=0, num_outputs=2)
        batch = g.size(latents, 0)
        cells = g.node("Transpose", g.reshape(latents, g.ints(batch, rows, columns, C, 2, 2)), perm=[0, 3, 1, 4, 2, 5])
        two = g.const([2])
        z = g.reshape(cells, g.ints(batch, C, g.mul(rows, two), g.mul(columns, two)))
        shift, scale = g.const(float(self.vae["shift_factor"])), g.const(float(self.vae["scaling_factor"]))
        x = g.add(g.node("Div", z, scale), shift)
        if self._has("post_quant_conv"):
            x = self._conv(x, "post_quant_conv", pads=(0, 0, 0, 0))
        x = self._middle(self._conv(x, "decoder.conv_in"), "decoder.mid_block")
        for i in range(len(self.vae["block_out_channels"])):
            block = f"decoder.up_blocks.{i}"
            x = self._resnets(x, block)
            if self._has(f"{block}.upsamplers.0.conv"):
                scales = g.const(np.array([1, 1, 2, 2], dtype=np.float32), torch.float32)
                x = g.but_bfloat16(
                    "Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric",
                    nearest_mode="floor",
                )  # fmt: skip
                x = self._conv(x, f"{block}.upsamplers.0.conv")
        x = self._conv_out(x, "decoder")
        half = g.const(0.5)
        bounds = (g.const(v, torch.float32 if g.dtype == torch.bfloat16 else g.dtype) for v in (0.0, 1.0))
        image = g.but_bfloat16("Clip", g.add(g.mul(x, half), half), *bounds)
        g.output(image, "images", ("batch", 3, "height", "width"))
        return g.model()

    # Layers

    def _has(self, layer: str) -> bool:
        return f"vae.{layer}.weight" in self.g.weights.tensors

    def _conv(self, x: str, layer: str, pads: tuple[int, int, int, int] = (1, 1, 1, 1), stride: int = 1) -> str:
        with self.g.scope(layer):
            weights = [self.g.weight(f"vae.{layer}.{kind}") for kind in ("weight", "bias")]
            return self.g.node("Conv", x, *weights, pads=list(pads), strides=[stride, stride])

    def _norm(self, x: str, layer: str) -> str:
        """GroupNorm: an InstanceNormalization of the groups, so that statistics are float32, and then the weights."""
        g = self.g
        with g.scope(layer):
            groups = g.to_float32(g.reshape(x, (0, self.groups, -1)))
            ones, zeros = (g.const(np.full(self.groups, v, dtype=np.float32), torch.float32) for v in (1, 0))
            normed = g.from_float32(g.node("InstanceNormalization", groups, ones, zeros, epsilon=NORM_EPS))
            normed = g.reshape(normed, g.node("Shape", x))
            axes = g.const([1, 2])
            weight, bias = (g.node("Unsqueeze", g.weight(f"vae.{layer}.{kind}"), axes) for kind in ("weight", "bias"))
            return g.add(g.mul(normed, weight), bias)

    def _resnets(self, x: str, block: str) -> str:
        number = 0
        while self._has(f"{block}.resnets.{number}.conv1"):
            x = self._resnet(x, f"{block}.resnets.{number}")
            number += 1
        return x

    def _resnet(self, x: str, layer: str) -> str:
        g = self.g
        y = self._conv(g.silu(self._norm(x, f"{layer}.norm1")), f"{layer}.conv1")
        y = self._conv(g.silu(self._norm(y, f"{layer}.norm2")), f"{layer}.conv2")
        if self._has(f"{layer}.conv_shortcut"):
            x = self._conv(x, f"{layer}.conv_shortcut", pads=(0, 0, 0, 0))
        return g.add(x, y)

    def _middle(self, x: str, block: str) -> str:
        x = self._resnet(x, f"{block}.resnets.0")
        if self._has(f"{block}.attentions.0.to_q"):
            x = self._attention(x, f"{block}.attentions.0")
        return self._resnet(x, f"{block}.resnets.1")

    def _attention(self, x: str, layer: str) -> str:
        """Attention with one head, in which all places see each other: [B, C, H, W] -> [B, C, H, W]."""
        g = self.g
        width = g.weights.tensors[f"vae.{layer}.to_q.weight"].shape[0]
        with g.scope(layer):
            normed = self._norm(x, f"{layer}.group_norm")
            flat = g.node("Transpose", g.reshape(normed, (0, 0, -1)), perm=[0, 2, 1])  # [B, H * W, C]
            shape = g.ints(g.size(flat, 0), g.size(flat, 1), width)
            rows = g.reshape(flat, (-1, width))
            q, k, v = (g.reshape(g.linear(rows, f"vae.{layer}.to_{name}"), shape) for name in "qkv")
            out = g.attention(q, k, v, 1, width)
            out = g.reshape(g.linear(g.reshape(out, (-1, width)), f"vae.{layer}.to_out.0"), shape)
            return g.add(x, g.reshape(g.node("Transpose", out, perm=[0, 2, 1]), g.node("Shape", x)))

    def _conv_out(self, x: str, part: str) -> str:
        return self._conv(self.g.silu(self._norm(x, f"{part}.conv_norm_out")), f"{part}.conv_out")
