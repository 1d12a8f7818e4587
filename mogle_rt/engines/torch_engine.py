"""What can run the loop. The torch engine prepares everything that no step changes, then runs steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.config import ModelConfig
from mogle_rt.engines.contract import Conditions
from mogle_rt.loop.buffers import StepInputs
from mogle_rt.loop.graphs import Runner, Runners
from mogle_rt.loop.schedule import Schedule
from mogle_rt.loop.step import Step
from mogle_rt.memory.packing import pack, to_pack
from mogle_rt.model.layout import Layout
from mogle_rt.model.loading import LazyWeights, load_mogle, load_transformer
from mogle_rt.model.modulation import ModulationTables, modulation_tables, time_embedding
from mogle_rt.model.positions import condition_ids, rope_table, token_ids
from mogle_rt.ops.attention import AttentionPlan
from mogle_rt.ops.choice import choose
from mogle_rt.torch_api.settings import settled

SHAPES_KEPT = 4  # on a GPU: shapes whose graphs are kept


class TorchEngine:
    """Face-MoGLE's step in PyTorch.

    Args:
        bundle: the weights.
        device, dtype: where and in what to compute.
        model: the reference's switches.
        kernels: see `mogle_rt.ops.choice.choose`.
        cuda_graphs: replay steps as one CUDA graph where there is a CUDA device.
        mixture: where the experts run: "bank", once an image, or "fused", in every step, in one launch with gate and
            sum; None takes for each run what costs less, see `mogle_rt.ops.triton_ops.cheaper_mixture`.

    Raises:
        ConfigError: the kernels can't be had or don't take so wide a model, or the mixture can't be fused.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        dtype: torch.dtype,
        model: ModelConfig,
        *,
        kernels: str | None = None,
        cuda_graphs: bool = True,
        mixture: str | None = None,
    ) -> None:
        self.ops = choose(kernels, device)
        self.ops.check_model(bundle.config.transformer, bundle.config.mogle)
        self.device, self.dtype, self.model = device, dtype, model
        self.config = bundle.config.transformer
        self.weights = LazyWeights(bundle, device, dtype)
        self.transformer = load_transformer(bundle, device, dtype, riding=self.ops.RIDING)
        self.mogle = load_mogle(bundle, device, dtype, weight_is_scale=model.weight_is_scale)
        self.mogle.check_mixture(mixture)
        self._mixture = mixture
        self._runners = Runners(device, cuda_graphs, limit=SHAPES_KEPT if device.type == "cuda" else 1)
        self._runner: Runner | None = None

    @settled()
    @torch.inference_mode()
    def prepare(self, conditions: Conditions, schedule: Schedule) -> None:
        """Compute what no step of a run changes, and hold it for the steps."""
        c = conditions
        prompt_embeds = c.prompt_embeds.to(self.device, self.dtype)
        pooled = c.pooled_prompt_embeds.to(self.device, self.dtype)
        mask_latents = c.mask_latents.to(self.device, self.dtype)
        batch, image_tokens = mask_latents.shape[0], mask_latents.shape[2]
        ids = token_ids(c.grid)
        moved = condition_ids(ids, c.position_delta, c.position_scale)
        joint_ids = torch.cat([ids.new_zeros(prompt_embeds.shape[1], 3), ids, moved])
        layout = Layout(
            text=prompt_embeds.shape[1],
            image=image_tokens,
            condition=image_tokens,
            plan=AttentionPlan.of(self.model, c.condition_scale),
            latent_lora=self.model.latent_lora,
            add_cond_attn=self.model.add_cond_attn,
        )
        mixture = self.mogle.prepare(mask_latents, self.ops, self._mixture, len(schedule))
        shapes = (batch, len(schedule), layout, type(mixture))
        made_from = (
            schedule.model_timesteps.to(self.device),
            torch.tensor(c.guidance_scale * 1000.0, dtype=torch.float32, device=self.device),
            pooled.expand(batch, -1).clone(),  # a later run is copied over it: not the caller's own
        )
        inputs = StepInputs(
            mixture=mixture,
            time_table=self.mogle.time_table(schedule.timesteps.to(self.device)),
            text=self.transformer.context_embedder(prompt_embeds.expand(batch, -1, -1).transpose(0, 1)),
            modulation=self._modulation(made_from, self._runners.find(shapes)),
            modulation_of=made_from,
            rope=self.ops.rope_buffer(rope_table(joint_ids.to(self.device), self.config.axes_dims_rope)),
            sigma_steps=schedule.sigmas.diff().to(self.device),
        )
        self.weights.release("transformer.context_embedder.weight")  # no step needs it
        self._runner = None  # where its shapes are not kept, its buffers go before new ones come
        if layers := to_pack(self.transformer, self.weights.bundle):
            self._runners.clear()  # their steps hold the plain weights
            pack(layers, self.weights.bundle)
        self._runner = self._runners.get(
            shapes,
            inputs,
            lambda: Step(self.transformer, self.mogle, inputs, layout, self.ops),
        )

    def _modulation(self, made_from: tuple[Tensor, Tensor, Tensor], last: Step | None) -> ModulationTables:
        """The run's tables; those of the last run of its shapes, if made from the same: their weights are a quarter of
        the model's, and not kept."""
        if last is not None and all(map(torch.equal, made_from, last.inputs.modulation_of)):
            return last.inputs.modulation
        timesteps, guidance, pooled = made_from
        taken = guidance.expand(len(pooled)) if self.config.guidance_embeds else None
        # One more timestep than the loop has: 0, the condition's, which is constant.
        temb = time_embedding(F.pad(timesteps, (0, 1)), taken, pooled, self.weights)
        return modulation_tables(self.config, temb[:-1], temb[-1], self.weights, latent_lora=self.model.latent_lora)

    @settled()
    @torch.inference_mode()
    def condition(self, latents: Tensor, k: int) -> Tensor:
        """Condition tokens of step k: [B, N, 64] -> [B, N, 64]."""
        self.start(latents, k)
        self.prepared.select()
        self.prepared.condition()
        return _image_major(self.prepared.buffers.condition)

    @settled()
    @torch.inference_mode()
    def velocity(self, latents: Tensor, condition: Tensor, k: int) -> Tensor:
        """The transformer's output in step k, for given condition tokens: [B, N, 64]."""
        self.start(latents, k)
        self.prepared.select()
        self.prepared.buffers.condition.copy_(condition.transpose(0, 1))
        self.prepared.velocity()
        return _image_major(self.prepared.buffers.velocity)

    def step(self, latents: Tensor, k: int) -> Tensor:
        """Velocity at step k of the prepared run: [B, N, 64] -> [B, N, 64]."""
        return self.velocity(latents, self.condition(latents, k), k)

    @settled()
    @torch.inference_mode()
    def start(self, latents: Tensor, k: int = 0) -> None:
        """Take latents [B, N, 64] into step k."""
        self._prepared_runner().start(latents.transpose(0, 1), k)

    @settled()
    @torch.inference_mode()
    def advance(self) -> None:
        """One step of the loop, Euler update included."""
        self._prepared_runner().advance()

    @property
    def execution(self) -> str:
        """How steps are run, see `Runner`."""
        return "not prepared" if self._runner is None else self._runner.execution

    def latents(self) -> Tensor:
        """[B, N, 64], after the last `advance`."""
        return _image_major(self.prepared.buffers.latents)

    @property
    def prepared(self) -> Step:
        """The step of the prepared run."""
        return self._prepared_runner().step

    def _prepared_runner(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("prepare() must be called before a step")
        return self._runner


def _image_major(x: Tensor) -> Tensor:
    """[N, B, C] -> [B, N, C], a copy."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)
