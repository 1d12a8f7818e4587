"""Face-MoGLE's step for training: it computes what the runtime computes, in a way that gradients can flow through.

Every image of a batch has its own noise level, so modulations are computed within the step. Nothing is changed in place.
`to_parts` gives the weights the names of the published files, and `load_parts` reads them under these names. As in the
runtime, q, k and v are one product. Shapes are those of `mogle_rt.bundle.schema`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from mogle_rt.bundle import schema
from mogle_rt.bundle.schema import EXPERT_NAMES, SINUSOID_DIM
from mogle_rt.config import NUM_EXPERTS, MogleConfig, TransformerConfig
from mogle_rt.model.positions import rope_table, token_ids

CONFIG = TransformerConfig(
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=6,
    joint_attention_dim=128,
    pooled_projection_dim=128,
    axes_dims_rope=(4, 14, 14),
)
RANK = 4
EPS = 1e-6
Parts = dict[str, dict[str, Tensor]]


def sinusoid(t: Tensor, channels: int) -> Tensor:
    """FLUX's embedding of a time, cosines first and without a frequency shift. t: [B] -> [B, channels]."""
    return get_timestep_embedding(t, channels, flip_sin_to_cos=True, downscale_freq_shift=0)


class Mlp(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inner, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class LoraLinear(nn.Module):
    """A linear layer, or several layers side by side, each with the branch's LoRA.

    Args:
        sizes: output features of each layer.
    """

    def __init__(self, inner: int, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        base = nn.Linear(inner, sum(sizes))
        self.weight, self.bias = base.weight, base.bias
        self.lora_down = nn.Parameter(torch.randn(RANK * len(sizes), inner) / inner**0.5)
        self.lora_up = nn.ParameterList(torch.zeros(size, RANK) for size in sizes)

    def lora(self, x: Tensor) -> Tensor:
        """What the branch's LoRA adds."""
        return F.linear(F.linear(x, self.lora_down), torch.block_diag(*self.lora_up))

    def forward(self, x: Tensor, rows_from: int) -> Tensor:
        """x: [B, L, in]; the LoRA acts on rows ``rows_from`` to the end.

        It is computed as one product, [x, xA] [W, B]ᵀ, where xA is zero for the other rows. This is cheaper to
        differentiate than an addition to some of the rows.
        """
        low = F.linear(x.split([rows_from, x.shape[1] - rows_from], 1)[1], self.lora_down)
        wide = torch.cat([x, F.pad(low, (0, 0, rows_from, 0))], -1)
        return F.linear(wide, torch.cat([self.weight, torch.block_diag(*self.lora_up)], 1), self.bias)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """AdaLN: LayerNorm(x) (1 + scale) + shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels. x: [B, L, 2, H, d], rope: complex [L, 1, 1, d / 2]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rope).flatten(-2)


class Normed(nn.Module):
    """RMSNorm of q and of k over each head; weights [2, d]."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, head))

    def forward(self, qk: Tensor) -> Tensor:
        """qk: [B, L, 2, H, d]."""
        return F.rms_norm(qk, qk.shape[-1:], eps=EPS) * self.weight[:, None]


def heads(x: Tensor, parts: int, count: int) -> Tensor:
    """[B, L, P * H * d] -> [B, L, P, H, d]."""
    return x.unflatten(-1, (parts, count, -1))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [B, M, H, d], k, v: [B, L, H, d] -> [B, M, H * d].

    Written out, because for so short sequences PyTorch's own attention takes up to three times as long, forth and back, in
    bfloat16 on a CPU. Only the weights are normalised in float32.
    """
    q, k, v = (t.transpose(1, 2) for t in (q * q.shape[-1] ** -0.5, k, v))
    weights = (q @ k.mT).softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D, d = config.width, config.attention_head_dim
        self.count = config.num_attention_heads
        self.modulation, self.context_modulation = LoraLinear(D, 6 * D), nn.Linear(D, 6 * D)
        self.norm_qk, self.context_norm_qk = Normed(d), Normed(d)
        self.qkv, self.out, self.ff_out = LoraLinear(D, D, D, D), LoraLinear(D, D), LoraLinear(4 * D, D)
        self.ff_in = nn.Linear(D, 4 * D)
        self.context_qkv, self.context_out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.context_ff_in, self.context_ff_out = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor, text: Tensor, temb: Tensor, temb0: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, 2 N, D], image, then condition. temb, temb0: [B, D] after SiLU, of the step and of timestep 0."""
        n, H = x.shape[1] // 2, self.count
        image = F.linear(temb, self.modulation.weight, self.modulation.bias)
        condition = F.linear(temb0, self.modulation.weight, self.modulation.bias) + self.modulation.lora(temb0)
        mod = torch.stack([image, condition], 1)[:, :, None].chunk(6, -1)  # each [B, 2, 1, D]
        context = self.context_modulation(temb)[:, None].chunk(6, -1)

        def grouped(x: Tensor) -> Tensor:
            return x.unflatten(1, (2, n))

        D = x.shape[-1]
        normed = modulate(grouped(x), mod[1], mod[0]).flatten(1, 2)
        qk, v = self.qkv(normed, n).split([2 * D, D], -1)
        context_qk, context_v = self.context_qkv(modulate(text, context[1], context[0])).split([2 * D, D], -1)
        qk = torch.cat([self.context_norm_qk(heads(context_qk, 2, H)), self.norm_qk(heads(qk, 2, H))], 1)
        v = heads(torch.cat([context_v, v], 1), 1, H)[:, :, 0]
        q, k = rotate(qk, rope).unbind(2)
        told, seen = attend(q, k, v).split([text.shape[1], 2 * n], 1)
        x = torch.addcmul(grouped(x), grouped(self.out(seen, n)), mod[2])
        text = torch.addcmul(text, self.context_out(told), context[2])
        y = self.ff_out(F.gelu(self.ff_in(modulate(x, mod[4], mod[3]).flatten(1, 2)), approximate="tanh"), n)
        x = torch.addcmul(x, grouped(y), mod[5]).flatten(1, 2)
        y = F.gelu(self.context_ff_in(modulate(text, context[4], context[3])), approximate="tanh")
        return x, torch.addcmul(text, self.context_ff_out(y), context[5])


class SingleBlock(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D = config.width
        self.count, self.width = config.num_attention_heads, D
        self.modulation = LoraLinear(D, 3 * D)
        self.norm_qk = Normed(config.attention_head_dim)
        self.qkv_mlp, self.out = LoraLinear(D, D, D, D, 4 * D), LoraLinear(5 * D, D)

    def forward(self, x: Tensor, n: int, temb: Tensor, temb0: Tensor, rope: Tensor) -> Tensor:
        """x: [B, T + 2 N, D]: text, image, condition."""
        h, gate = self._normed(x, n, temb, temb0)
        D, rest = self.width, x.shape[1] - n
        qk, v, mlp = self.qkv_mlp(h, rest).split([2 * D, D, 4 * D], -1)
        q, k = rotate(self.norm_qk(heads(qk, 2, self.count)), rope).unbind(2)
        attention = attend(q, k, heads(v, 1, self.count)[:, :, 0])
        y = self.out(torch.cat([attention, F.gelu(mlp, approximate="tanh")], -1), rest)
        return torch.addcmul(x, y, gate)

    def image_rows(self, x: Tensor, n: int, temb: Tensor, temb0: Tensor, rope: Tensor) -> Tensor:
        """The same for the image's rows alone, [B, N, D], which are all that is needed of the last block."""
        h, gate = self._normed(x, n, temb, temb0)
        D, rest, layer = self.width, x.shape[1] - n, self.qkv_mlp
        rows = [rest - n, n, n]
        low = F.linear(h.split([rest, n], 1)[1], layer.lora_down)
        wide = torch.cat([h, F.pad(low, (0, 0, rest, 0))], -1)
        weight = torch.cat([layer.weight, torch.block_diag(*layer.lora_up)], 1)
        kv = F.linear(wide, weight[D : 3 * D], layer.bias[D : 3 * D])
        image = h.split(rows, 1)[1]
        q, mlp = (
            F.linear(image, layer.weight[:D], layer.bias[:D]),
            F.linear(image, layer.weight[3 * D :], layer.bias[3 * D :]),
        )
        k, v = heads(kv, 2, self.count).unbind(2)
        q = heads(q, 1, self.count)[:, :, 0]
        q, k = (F.rms_norm(t, t.shape[-1:], self.norm_qk.weight[i], EPS)[:, :, None] for i, t in enumerate((q, k)))
        q, k = rotate(q, rope.split(rows)[1]), rotate(k, rope)
        attention = attend(q[:, :, 0], k[:, :, 0], v)
        joined = torch.cat([attention, F.gelu(mlp, approximate="tanh")], -1)
        y = F.linear(joined, self.out.weight, self.out.bias)
        return torch.addcmul(x.split(rows, 1)[1], y, gate.split(rows, 1)[1])

    def _normed(self, x: Tensor, n: int, temb: Tensor, temb0: Tensor) -> tuple[Tensor, Tensor]:
        """AdaLN of all rows, and the gates of all rows: [B, L, D] both."""
        rest = x.shape[1] - n
        m = F.linear(temb, self.modulation.weight, self.modulation.bias)[:, None].chunk(3, -1)
        m0 = F.linear(temb0, self.modulation.weight, self.modulation.bias) + self.modulation.lora(temb0)
        pairs = zip(m, m0[:, None].chunk(3, -1), strict=True)
        shift, scale, gate = (torch.cat([a.expand(-1, rest, -1), b.expand(-1, n, -1)], 1) for a, b in pairs)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale), gate


class Mixture(nn.Module):
    """Experts and gate. With ``scalar_gate`` an expert has one weight for a whole image (``weight_is_scale``)."""

    def __init__(self, config: MogleConfig, *, scalar_gate: bool = False) -> None:
        super().__init__()
        self.scalar_gate = scalar_gate
        C, H, E = config.latent_dim, config.expert_dim, NUM_EXPERTS
        self.expert_in, self.expert_out = (nn.Parameter(torch.randn(E, o, i) / i**0.5) for o, i in ((H, C), (C, H)))
        self.expert_in_bias, self.expert_out_bias = (nn.Parameter(torch.zeros(E, o)) for o in (H, C))
        self.timestep_embedding = Mlp(C, C)
        self.noise_proj, self.gate_in = nn.Linear(C, C), nn.Linear(C, config.gate_dim)
        self.gate_out = nn.Linear(config.gate_dim, E)

    def forward(self, masks: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
        """masks: [B, 20, N, 64], latents: [B, N, 64], timestep: [B], 0 to 1000 -> condition tokens [B, N, 64]."""
        B, E, N, C = masks.shape
        x = masks.transpose(0, 1).reshape(E, B * N, C)
        hidden = F.relu(torch.baddbmm(self.expert_in_bias[:, None], x, self.expert_in.mT))
        y = torch.baddbmm(self.expert_out_bias[:, None], hidden, self.expert_out.mT).view(E, B, N, C)
        h = masks[:, 0] + self.noise_proj(latents) + self.timestep_embedding(sinusoid(timestep, C))[:, None]
        weights = self.gate_out(F.relu(self.gate_in(h))).softmax(-1)
        if self.scalar_gate:
            weights = weights.mean(1, keepdim=True).expand_as(weights)
        return torch.einsum("bne,ebnc->bnc", weights, y)


class FaceMogle(nn.Module):
    """Transformer, branch LoRA, experts and gate."""

    def __init__(self, config: TransformerConfig = CONFIG, *, scalar_gate: bool = False) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.mogle = Mixture(MogleConfig(), scalar_gate=scalar_gate)
        self.x_embedder = LoraLinear(config.in_channels, D)
        self.context_embedder = nn.Linear(config.joint_attention_dim, D)
        self.timestep_embedder, self.text_embedder = Mlp(SINUSOID_DIM, D), Mlp(config.pooled_projection_dim, D)
        self.guidance_embedder = Mlp(SINUSOID_DIM, D) if config.guidance_embeds else None
        self.blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.norm_out, self.proj_out = nn.Linear(D, 2 * D), nn.Linear(D, config.in_channels)
        for name, parameter in self.named_parameters():
            zero = ("modulation.weight", "modulation.bias", "norm_out", "proj_out", "guidance_embedder.linear_2")
            if any(word in name for word in zero):
                nn.init.zeros_(parameter)

    def rope(self, text: int, grid: tuple[int, int]) -> Tensor:
        """Rotary table of the joint sequence, [L, 1, 1, d / 2]. Text has ids 0, and the condition has the image's ids."""
        ids = token_ids(grid)
        return rope_table(torch.cat([torch.zeros(text, 3), ids, ids]), self.config.axes_dims_rope)[:, None, None]

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        masks: Tensor,
        sequence: Tensor,
        pooled: Tensor,
        rope: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, N, 64].

        Args:
            latents: [B, N, 64], noisy. sigma: [B], 0 to 1. masks: [B, 20, N, 64], packed latents of the 20 pictures.
            sequence: [B, T, J]. pooled: [B, P]. rope: see `rope`. guidance: [B], for a model that embeds it.
        """
        n = latents.shape[1]
        condition = self.mogle(masks, latents, 1000 * sigma)
        words = self.text_embedder(pooled)
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("this model embeds guidance, and got none")
            words = words + self.guidance_embedder(sinusoid(1000 * guidance, SINUSOID_DIM))
        temb = F.silu(self.timestep_embedder(sinusoid(1000 * sigma, SINUSOID_DIM)) + words)
        temb0 = F.silu(self.timestep_embedder(sinusoid(0 * sigma, SINUSOID_DIM)) + words)
        x = self.x_embedder(torch.cat([latents, condition], 1), n)
        text = self.context_embedder(sequence)
        for block in self.blocks:
            x, text = block(x, text, temb, temb0, rope)
        x = torch.cat([text, x], 1)
        for block in self.single_blocks[:-1]:
            x = block(x, n, temb, temb0, rope)
        last = self.single_blocks[-1]
        assert isinstance(last, SingleBlock)
        x = last.image_rows(x, n, temb, temb0, rope)
        scale, shift = self.norm_out(temb)[:, None].chunk(2, -1)
        return self.proj_out(modulate(x, scale, shift))


def _layers(model: FaceMogle) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Every linear layer, with the names of the stored layers that it consists of."""
    prefix = "time_text_embed"
    found: list[tuple[nn.Module, tuple[str, ...]]] = [
        (getattr(model, name), (name,)) for name in ("x_embedder", "context_embedder", "proj_out")
    ]
    found.append((model.norm_out, ("norm_out.linear",)))
    embedders = ["timestep_embedder", "text_embedder"]
    if model.guidance_embedder is not None:
        embedders.append("guidance_embedder")
    for embedder in embedders:
        for i in (1, 2):
            layer = model.get_submodule(f"{embedder}.linear_{i}")
            found.append((layer, (f"{prefix}.{embedder}.linear_{i}",)))
    for kind, stack, stacked in (
        ("transformer_blocks", model.blocks, schema.DOUBLE_STACKED),
        ("single_transformer_blocks", model.single_blocks, schema.SINGLE_STACKED),
    ):
        for i, block in enumerate(stack):
            found += [(block.get_submodule(name), f.at(i).sources) for name, f in stacked.items()]
            norm = "norm1" if stack is model.blocks else "norm"
            found.append((block.get_submodule("modulation"), (f"{kind}.{i}.{norm}.linear",)))
            if stack is model.blocks:
                found.append((block.get_submodule("context_modulation"), (f"{kind}.{i}.norm1_context.linear",)))
    return found


def _norms(model: FaceMogle) -> list[tuple[Tensor, tuple[str, ...]]]:
    """The weights [2, d] of the norms of q and k, with the stored layers that they consist of, where text comes first."""
    found: list[tuple[Tensor, tuple[str, ...]]] = []
    for i, block in enumerate(model.blocks):
        names = schema.DOUBLE_NORM_STACKED["norm_qk"].at(i).sources
        found.append((block.get_parameter("context_norm_qk.weight"), names[:2]))
        found.append((block.get_parameter("norm_qk.weight"), names[2:]))
    for i, block in enumerate(model.single_blocks):
        names = schema.SINGLE_NORM_STACKED["norm_qk"].at(i).sources
        found.append((block.get_parameter("norm_qk.weight"), names))
    return found


def to_parts(model: FaceMogle) -> Parts:
    """Views of the weights by part (``transformer``, ``lora``, ``mogle``) and published name."""
    parts: Parts = {"transformer": {}, "lora": {}, "mogle": {}}
    for layer, sources in _layers(model):
        weight, bias = layer.get_parameter("weight").detach(), layer.get_parameter("bias").detach()
        sizes = layer.sizes if isinstance(layer, LoraLinear) else (weight.shape[0] // len(sources),) * len(sources)
        for name, w, b in zip(sources, weight.split(list(sizes)), bias.split(list(sizes)), strict=True):
            parts["transformer"] |= {f"{name}.weight": w, f"{name}.bias": b}
        if isinstance(layer, LoraLinear):
            downs = layer.lora_down.detach().split(RANK)
            for name, down, up in zip(sources, downs, layer.lora_up, strict=True):
                parts["lora"] |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up.detach()}
    for weight, sources in _norms(model):
        parts["transformer"] |= {f"{name}.weight": row for name, row in zip(sources, weight.detach(), strict=True)}
    m = model.mogle
    for stacked, name in (
        (m.expert_in, "net.0.weight"),
        (m.expert_in_bias, "net.0.bias"),
        (m.expert_out, "net.2.weight"),
        (m.expert_out_bias, "net.2.bias"),
    ):
        parts["mogle"] |= {f"{e}.{name}": row for e, row in zip(EXPERT_NAMES, stacked.detach(), strict=True)}
    for gate_layer, name in (
        (m.timestep_embedding.linear_1, "timestep_embedding.linear_1"),
        (m.timestep_embedding.linear_2, "timestep_embedding.linear_2"),
        (m.noise_proj, "noise_proj"),
        (m.gate_in, "gate.0"),
        (m.gate_out, "gate.2"),
    ):
        parts["mogle"] |= {f"gating.{name}.{kind}": getattr(gate_layer, kind).detach() for kind in ("weight", "bias")}
    return parts


@torch.no_grad()
def load_parts(model: FaceMogle, parts: Parts, *, grow: bool = False) -> None:
    """The reverse of `to_parts`: fill a model from tensors by part and published name.

    With ``grow`` the model may have further blocks at its end, and may embed guidance. These parts keep their first weights,
    with which they change nothing: a block's modulation is zero, and with it the gate of what it adds, and so is the
    embedding of guidance.
    """
    for part, views in to_parts(model).items():
        for name, view in views.items():
            if not grow or name in parts[part]:
                view.copy_(parts[part][name])
