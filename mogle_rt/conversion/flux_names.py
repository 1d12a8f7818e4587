"""The names of layers in FLUX's own code, and the layers of diffusers (as stored in a bundle) that they correspond to.

FLUX stacks q, k and v (and, in single blocks, the MLP's first layer) in one layer, row below row. diffusers has a
separate layer for each. The modulation of the last norm is (shift, scale) in FLUX and (scale, shift) in diffusers. The
names are those of black-forest-labs/flux (``src/flux/model.py``) and of diffusers' ``FluxTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mogle_rt.config import MLP_RATIO, TransformerConfig


@dataclass(frozen=True)
class Rows:
    """The stored layers that the rows of a FLUX layer belong to, in order, and how many rows each has.

    Attributes:
        layers: the stored layers' names, as in diffusers.
        sizes: the number of rows of each, in units of the model's width; 0 if there is only one layer.
        swapped: whether the two halves of the rows are in the opposite order.
    """

    layers: tuple[str, ...]
    sizes: tuple[int, ...] = (0,)
    swapped: bool = False


def _attention(prefix: str, names: str) -> Rows:
    return Rows(tuple(f"{prefix}.{names.format(x)}" for x in "qkv"), (1, 1, 1))


_D, _S = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
WHOLE = {
    "img_in": Rows(("x_embedder",)),
    "txt_in": Rows(("context_embedder",)),
    "time_in.in_layer": Rows(("time_text_embed.timestep_embedder.linear_1",)),
    "time_in.out_layer": Rows(("time_text_embed.timestep_embedder.linear_2",)),
    "vector_in.in_layer": Rows(("time_text_embed.text_embedder.linear_1",)),
    "vector_in.out_layer": Rows(("time_text_embed.text_embedder.linear_2",)),
    "guidance_in.in_layer": Rows(("time_text_embed.guidance_embedder.linear_1",)),
    "guidance_in.out_layer": Rows(("time_text_embed.guidance_embedder.linear_2",)),
    "final_layer.linear": Rows(("proj_out",)),
    "final_layer.adaLN_modulation.1": Rows(("norm_out.linear",), swapped=True),
}
DOUBLE = {
    "img_mod.lin": Rows((f"{_D}.norm1.linear",)),
    "txt_mod.lin": Rows((f"{_D}.norm1_context.linear",)),
    "img_attn.qkv": _attention(f"{_D}.attn", "to_{}"),
    "txt_attn.qkv": _attention(f"{_D}.attn", "add_{}_proj"),
    "img_attn.proj": Rows((f"{_D}.attn.to_out.0",)),
    "txt_attn.proj": Rows((f"{_D}.attn.to_add_out",)),
    "img_mlp.0": Rows((f"{_D}.ff.net.0.proj",)),
    "img_mlp.2": Rows((f"{_D}.ff.net.2",)),
    "txt_mlp.0": Rows((f"{_D}.ff_context.net.0.proj",)),
    "txt_mlp.2": Rows((f"{_D}.ff_context.net.2",)),
}
SINGLE = {
    "modulation.lin": Rows((f"{_S}.norm.linear",)),
    "linear1": Rows((*(f"{_S}.attn.to_{x}" for x in "qkv"), f"{_S}.proj_mlp"), (1, 1, 1, MLP_RATIO)),
    "linear2": Rows((f"{_S}.proj_out",)),
}
# RMSNorm weights are called "scale" in FLUX and "weight" in diffusers.
DOUBLE_SCALES = {
    "img_attn.norm.query_norm": f"{_D}.attn.norm_q",
    "img_attn.norm.key_norm": f"{_D}.attn.norm_k",
    "txt_attn.norm.query_norm": f"{_D}.attn.norm_added_q",
    "txt_attn.norm.key_norm": f"{_D}.attn.norm_added_k",
}
SINGLE_SCALES = {"norm.query_norm": f"{_S}.attn.norm_q", "norm.key_norm": f"{_S}.attn.norm_k"}


def flux_layers(config: TransformerConfig) -> Iterator[tuple[str, Rows]]:
    """Every linear layer of a model by its name in FLUX, with the numbers of the blocks filled in."""
    yield from WHOLE.items()
    for prefix, count, table in (
        ("double_blocks", config.num_layers, DOUBLE),
        ("single_blocks", config.num_single_layers, SINGLE),
    ):
        for i in range(count):
            for name, rows in table.items():
                layers = tuple(layer.format(i=i) for layer in rows.layers)
                yield f"{prefix}.{i}.{name}", Rows(layers, rows.sizes, rows.swapped)


def flux_scales(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """Every RMSNorm of a model: its name in FLUX, and its name in diffusers."""
    for prefix, count, table in (
        ("double_blocks", config.num_layers, DOUBLE_SCALES),
        ("single_blocks", config.num_single_layers, SINGLE_SCALES),
    ):
        for i in range(count):
            for name, stored in table.items():
                yield f"{prefix}.{i}.{name}", stored.format(i=i)
