"""Which tensors a bundle holds, and which of them make up each stacked layer of the runtime. Mostly tables.

Shapes are written in symbols: D is the model's width, M the MLP's hidden size, d the size of a head, J the width of
text embeddings, P that of pooled ones, C the latent channels of a token (64), S the channels of a sinusoid, L the
channels of experts and gate, H the hidden size of an expert, G that of the gate, and E the number of experts. A leading
digit multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mogle_rt.config import MLP_RATIO, NUM_CLASSES, NUM_EXPERTS, MogleConfig, TransformerConfig
from mogle_rt.errors import CheckpointError

Shape = tuple[int, ...]

SINUSOID_DIM = 256  # channels of FLUX's timestep and guidance sinusoids

# Linear layers: name -> (output size, input size). `{i}` stands for the block's number.
EMBEDDERS = {
    "x_embedder": ("D", "C"),
    "context_embedder": ("D", "J"),
    "proj_out": ("C", "D"),
}
TIME_EMBEDDERS = {
    "time_text_embed.timestep_embedder.linear_1": ("D", "S"),
    "time_text_embed.timestep_embedder.linear_2": ("D", "D"),
    "time_text_embed.guidance_embedder.linear_1": ("D", "S"),
    "time_text_embed.guidance_embedder.linear_2": ("D", "D"),
    "time_text_embed.text_embedder.linear_1": ("D", "P"),
    "time_text_embed.text_embedder.linear_2": ("D", "D"),
}
MODULATION = {
    "transformer_blocks.{i}.norm1.linear": ("6D", "D"),
    "transformer_blocks.{i}.norm1_context.linear": ("6D", "D"),
    "single_transformer_blocks.{i}.norm.linear": ("3D", "D"),
    "norm_out.linear": ("2D", "D"),
}
DOUBLE_LINEARS = {
    "transformer_blocks.{i}.attn.to_q": ("D", "D"),
    "transformer_blocks.{i}.attn.to_k": ("D", "D"),
    "transformer_blocks.{i}.attn.to_v": ("D", "D"),
    "transformer_blocks.{i}.attn.add_q_proj": ("D", "D"),
    "transformer_blocks.{i}.attn.add_k_proj": ("D", "D"),
    "transformer_blocks.{i}.attn.add_v_proj": ("D", "D"),
    "transformer_blocks.{i}.attn.to_out.0": ("D", "D"),
    "transformer_blocks.{i}.attn.to_add_out": ("D", "D"),
    "transformer_blocks.{i}.ff.net.0.proj": ("M", "D"),
    "transformer_blocks.{i}.ff.net.2": ("D", "M"),
    "transformer_blocks.{i}.ff_context.net.0.proj": ("M", "D"),
    "transformer_blocks.{i}.ff_context.net.2": ("D", "M"),
}
SINGLE_LINEARS = {
    "single_transformer_blocks.{i}.attn.to_q": ("D", "D"),
    "single_transformer_blocks.{i}.attn.to_k": ("D", "D"),
    "single_transformer_blocks.{i}.attn.to_v": ("D", "D"),
    "single_transformer_blocks.{i}.proj_mlp": ("M", "D"),
    "single_transformer_blocks.{i}.proj_out": ("D", "D+M"),
}
DOUBLE_NORMS = tuple(f"transformer_blocks.{{i}}.attn.{n}" for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
SINGLE_NORMS = tuple(f"single_transformer_blocks.{{i}}.attn.{n}" for n in ("norm_q", "norm_k"))

LORA_TARGETS = (
    "x_embedder",
    "transformer_blocks.{i}.norm1.linear",
    "transformer_blocks.{i}.attn.to_q",
    "transformer_blocks.{i}.attn.to_k",
    "transformer_blocks.{i}.attn.to_v",
    "transformer_blocks.{i}.attn.to_out.0",
    "transformer_blocks.{i}.ff.net.2",
    "single_transformer_blocks.{i}.norm.linear",
    "single_transformer_blocks.{i}.attn.to_q",
    "single_transformer_blocks.{i}.attn.to_k",
    "single_transformer_blocks.{i}.attn.to_v",
    "single_transformer_blocks.{i}.proj_mlp",
    "single_transformer_blocks.{i}.proj_out",
)

EXPERT_NAMES = ("global_expert", *(f"local_experts.{i}" for i in range(NUM_CLASSES)))
EXPERT = {"net.0": ("H", "L"), "net.2": ("L", "H")}
GATING = {
    "gating.timestep_embedding.linear_1": ("L", "L"),
    "gating.timestep_embedding.linear_2": ("L", "L"),
    "gating.noise_proj": ("L", "L"),
    "gating.gate.0": ("G", "L"),
    "gating.gate.2": ("E", "G"),
}


def _dims(config: TransformerConfig) -> dict[str, int]:
    D = config.width
    M = MLP_RATIO * D
    return {
        "D": D,
        "2D": 2 * D,
        "3D": 3 * D,
        "6D": 6 * D,
        "M": M,
        "D+M": D + M,
        "J": config.joint_attention_dim,
        "P": config.pooled_projection_dim,
        "C": config.in_channels,
        "S": SINUSOID_DIM,
    }


def _numbers(name: str, config: TransformerConfig) -> Iterator[str]:
    """The name itself, or, if it contains ``{i}``, the name in every block."""
    if "{i}" not in name:
        yield name
        return
    count = config.num_single_layers if name.startswith("single") else config.num_layers
    for i in range(count):
        yield name.format(i=i)


def _blocks(config: TransformerConfig, table: dict[str, tuple[str, str]]) -> Iterator[tuple[str, Shape]]:
    """The tensors of the layers in a table, block by block: all weights of a block, then all its biases.

    The weights that the runtime stacks (q, k, v, proj_mlp) are therefore adjacent in the file, so one view covers them.
    """
    dims = _dims(config)
    count = config.num_single_layers if next(iter(table)).startswith("single") else config.num_layers
    for i in range(count):
        for name, (out, inner) in table.items():
            yield f"{name.format(i=i)}.weight", (dims[out], dims[inner])
        for name, (out, _) in table.items():
            yield f"{name.format(i=i)}.bias", (dims[out],)


def transformer_tensors(config: TransformerConfig) -> dict[str, Shape]:
    """The names (as in diffusers) and shapes of the transformer's tensors, in their order in a bundle."""
    dims = _dims(config)
    tensors: dict[str, Shape] = {}
    for name, (out, inner) in EMBEDDERS.items():
        tensors |= {f"{name}.weight": (dims[out], dims[inner]), f"{name}.bias": (dims[out],)}
    tensors |= dict(_blocks(config, DOUBLE_LINEARS)) if config.num_layers else {}
    tensors |= dict(_blocks(config, SINGLE_LINEARS)) if config.num_single_layers else {}
    for template in DOUBLE_NORMS + SINGLE_NORMS:
        tensors |= {f"{n}.weight": (config.attention_head_dim,) for n in _numbers(template, config)}
    for template, (out, inner) in (TIME_EMBEDDERS | MODULATION).items():
        if "guidance" in template and not config.guidance_embeds:
            continue
        for name in _numbers(template, config):
            tensors |= {f"{name}.weight": (dims[out], dims[inner]), f"{name}.bias": (dims[out],)}
    return tensors


def lora_modules(config: TransformerConfig) -> dict[str, Shape]:
    """Every layer that the condition branch's LoRA adapts, with its (output size, input size)."""
    dims = _dims(config)
    table = EMBEDDERS | MODULATION | DOUBLE_LINEARS | SINGLE_LINEARS
    return {
        name: (dims[table[template][0]], dims[table[template][1]])
        for template in LORA_TARGETS
        for name in _numbers(template, config)
    }


def lora_tensors(config: TransformerConfig, ranks: dict[str, int]) -> dict[str, Shape]:
    """The names and shapes of the LoRA's tensors. ``ranks`` gives the LoRA's rank on each layer."""
    tensors: dict[str, Shape] = {}
    for name, (out, inner) in lora_modules(config).items():
        tensors[f"{name}.lora_A.weight"] = (ranks[name], inner)
        tensors[f"{name}.lora_B.weight"] = (out, ranks[name])
    return tensors


def mogle_tensors(config: MogleConfig) -> dict[str, Shape]:
    """The names and shapes of the mixture's tensors, as in the reference's state dict of experts and gate."""
    dims = {"L": config.latent_dim, "H": config.expert_dim, "G": config.gate_dim, "E": NUM_EXPERTS}
    layers: dict[str, tuple[str, str]] = {}
    if config.has_expert:
        layers |= {f"{e}.{layer}": shape for layer, shape in EXPERT.items() for e in EXPERT_NAMES}
    if config.has_gating:
        layers |= GATING
    tensors: dict[str, Shape] = {}
    for name, (out, inner) in layers.items():
        tensors[f"{name}.weight"] = (dims[out], dims[inner])
    for name, (out, _) in layers.items():
        tensors[f"{name}.bias"] = (dims[out],)
    return tensors


@dataclass(frozen=True)
class Stacked:
    """The stored layers that make up one layer of the runtime, stacked along the output dimension."""

    sources: tuple[str, ...]

    def at(self, i: int) -> Stacked:
        """The same layers with the block's number filled in."""
        return Stacked(tuple(s.format(i=i) for s in self.sources))


# Layers of the runtime (mogle_rt.model.transformer) -> stored layers.
DOUBLE_STACKED = {
    "qkv": Stacked(tuple(f"transformer_blocks.{{i}}.attn.to_{x}" for x in "qkv")),
    "out": Stacked(("transformer_blocks.{i}.attn.to_out.0",)),
    "ff_in": Stacked(("transformer_blocks.{i}.ff.net.0.proj",)),
    "ff_out": Stacked(("transformer_blocks.{i}.ff.net.2",)),
    "context_qkv": Stacked(tuple(f"transformer_blocks.{{i}}.attn.add_{x}_proj" for x in "qkv")),
    "context_out": Stacked(("transformer_blocks.{i}.attn.to_add_out",)),
    "context_ff_in": Stacked(("transformer_blocks.{i}.ff_context.net.0.proj",)),
    "context_ff_out": Stacked(("transformer_blocks.{i}.ff_context.net.2",)),
}
SINGLE_STACKED = {
    "qkv_mlp": Stacked(
        (
            *(f"single_transformer_blocks.{{i}}.attn.to_{x}" for x in "qkv"),
            "single_transformer_blocks.{i}.proj_mlp",
        )
    ),
    "out": Stacked(("single_transformer_blocks.{i}.proj_out",)),
}
# In the runtime, the RMSNorm weights of a double block are one tensor [2, 2, d]: q's and k's for text, then q's and k's
# for the rest. In a single block they are one tensor [1, 2, d].
DOUBLE_NORM_STACKED = {"norm_qk": Stacked(DOUBLE_NORMS[2:] + DOUBLE_NORMS[:2])}
SINGLE_NORM_STACKED = {"norm_qk": Stacked(SINGLE_NORMS)}


def in_blocks(
    config: TransformerConfig, double: Mapping[str, Stacked], single: Mapping[str, Stacked]
) -> Iterator[tuple[str, Stacked]]:
    """The layers of such tables in every block: the full name in the runtime, and the stored layers."""
    for stack, count, table in (
        ("blocks", config.num_layers, double),
        ("single_blocks", config.num_single_layers, single),
    ):
        for i in range(count):
            for layer, stacked in table.items():
                yield f"{stack}.{i}.{layer}", stacked.at(i)


def block_stacks(config: TransformerConfig) -> Iterator[tuple[str, ...]]:
    """The stored layers that each linear layer of the blocks is made of: those that a weight format may hold."""
    for _, stacked in in_blocks(config, DOUBLE_STACKED, SINGLE_STACKED):
        yield stacked.sources


def check_names(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str | Path
) -> None:
    """Check that names and shapes are those expected. ``where`` names the file in errors.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; the message names the first.
    """
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{where}: missing tensor {name!r} of shape {list(shape)}")
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(f"{where}: tensor {name!r} has shape {list(found[name])}, expected {list(shape)}")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{where}: unexpected tensor {name!r}")
