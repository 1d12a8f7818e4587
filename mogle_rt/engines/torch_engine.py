"""The torch engine. It first prepares everything that no step changes, and then runs steps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mogle_rt.bundle.source import TensorSource
from mogle_rt.config import ModelConfig
from mogle_rt.engines.contract import Conditions
from mogle_rt.fast.adaptive import course_of
from mogle_rt.fast.course import Course
from mogle_rt.fast.settings import FastConfig
from mogle_rt.linear.formats import choose_format
from mogle_rt.loop.buffers import StepInputs
from mogle_rt.loop.graphs import Runner, Runners, with_room
from mogle_rt.loop.schedule import Position, Schedule, step_capacity, with_further_rows
from mogle_rt.loop.step import Step
from mogle_rt.memory.planner import KEPT, TABLES_KEPT, Plan
from mogle_rt.memory.streaming import make_ring
from mogle_rt.model.layout import Layout
from mogle_rt.model.loading import LazyWeights, load_context_embedder, load_mogle, load_transformer
from mogle_rt.model.mixture import Bank, Fused
from mogle_rt.model.modulation import KeptTables, ModulationTables, modulation_tables, time_embedding
from mogle_rt.model.positions import condition_ids, rope_table, token_ids
from mogle_rt.model.styles import Styles
from mogle_rt.model.transformer import Transformer
from mogle_rt.ops.attention import Visibility, log_scale_of
from mogle_rt.ops.choice import choose
from mogle_rt.torch_api.settings import settled

# On a GPU, the bytes that the inputs and buffers of kept graphs may take together. One image of FLUX.1-dev at 512 x 512
# pixels and up to 32 steps takes about 0.25 GB, and at 1024 x 1024 pixels about 0.7 GB.
KEPT_BYTES = 2 << 30
NO_TIMESTEP = -1.0  # padding of `StepInputs.modulation_of`'s timesteps, so that schedules of other lengths differ


class TorchEngine:
    """Runs Face-MoGLE's step with PyTorch.

    Args:
        bundle: the weights.
        device, dtype: the device and dtype of the computation.
        model: the reference's switches.
        kernels: see `mogle_rt.ops.choice.choose`.
        cuda_graphs: whether to replay the steps as one CUDA graph on a CUDA device.
        mixture: when the experts run. "bank": once per image. "fused": in every step, in one launch with the gate and
            the sum. None: the cheaper one for each run, see `mogle_rt.ops.triton_ops.cheaper_mixture`.
        weights: the format of the blocks' weights that are stored plainly, see `mogle_rt.linear.formats.choose_format`.
        streamed: the indices of the sublayers whose weights are streamed, see `stream_sublayers`.

    Raises:
        ConfigError: the kernels are not available or don't support the model's width, the mixture can't be fused, or
            there is no such weight format.

    Attributes:
        styles: LoRAs on top of the model. Changes apply from the next `prepare` on.
    """

    def __init__(
        self,
        bundle: TensorSource,
        device: torch.device,
        dtype: torch.dtype,
        model: ModelConfig,
        *,
        kernels: str | None = None,
        cuda_graphs: bool = True,
        mixture: str | None = None,
        weights: str | None = None,
        streamed: Sequence[int] = (),
    ) -> None:
        self.ops = choose(kernels, device)
        self.ops.check_model(bundle.config.transformer, bundle.config.mogle)
        self.device, self.dtype, self.model = device, dtype, model
        self.config = bundle.config.transformer
        self.styles = Styles(self.config)
        self.weights = LazyWeights(bundle, device, dtype)
        self.tables = KeptTables(TABLES_KEPT)
        self.format = choose_format(weights, bundle)
        self._transformer: Transformer | None = None
        self.context_embedder = load_context_embedder(bundle, device, dtype)
        self.mogle = load_mogle(bundle, device, dtype, weight_is_scale=model.weight_is_scale)
        self.mogle.check_mixture(mixture)
        self._mixture = mixture
        self._runners = Runners(device, cuda_graphs, limit=KEPT_BYTES if device.type == "cuda" else 0)
        self._runner: Runner | None = None
        self._position, self._course = Position(0), Course(None, [])
        self._streamed = tuple(streamed)
        if device.type != "cpu":
            self._transformer = self._load_transformer()

    @property
    def transformer(self) -> Transformer:
        """The weights of the steps. On a CPU they are loaded when first needed. By then the weights of modulation have
        been read, used and released, so less memory is in use at the same time."""
        if self._transformer is None:
            self._transformer = self._load_transformer()
        return self._transformer

    def _load_transformer(self) -> Transformer:
        return load_transformer(
            self.weights.source,
            self.device,
            self.dtype,
            weight_format=self.format,
            fused=self.ops.RIDING,
            latent_lora=self.model.latent_lora,
            stream=lambda sublayers: make_ring(sublayers, self._streamed, self.device),
        )

    def follow(self, plan: Plan) -> None:
        """Hold and stream what a plan says."""
        self.stream_sublayers(plan.streamed)
        self.weights.keep(plan.modulation == KEPT)
        self.tables.limit = 0 if plan.takes_turns else TABLES_KEPT

    def let_go(self) -> None:
        """Free weights and buffers of the steps. The next `prepare` makes them anew."""
        self._runner = self._transformer = None
        self._runners.clear()
        self.styles.forget_layers()

    def stream_sublayers(self, places: Sequence[int]) -> None:
        """Keep all weights in memory except those of some sublayers, which are read again in each step.

        The results are the same bit for bit. The weights loaded before are dropped, and loaded again when needed.

        Args:
            places: the indices of these sublayers among all, ascending, see `mogle_rt.model.transformer.sublayers`.
        """
        if tuple(places) == self._streamed:
            return
        self._streamed = tuple(places)
        self.let_go()

    @property
    def weight_formats(self) -> str:
        """The formats of the loaded weights and the bytes in each, such as "packed 1.2 GB, plain 0.1 GB"."""
        if self._transformer is None:
            return "not loaded"
        held = sorted(self._transformer.bytes_by_format().items(), key=lambda item: -item[1])
        told = [f"{name} {_size(number)}" for name, number in held]
        if (stream := self._transformer.stream) is not None:
            told.append(f"{len(stream.numbers)} sublayers streamed through {_size(stream.nbytes)}")
        return ", ".join(told)

    @settled()
    @torch.inference_mode()
    def prepare(self, conditions: Conditions, schedule: Schedule) -> None:
        """Compute everything that no step of a run changes, and keep it for the steps.

        Raises:
            torch.OutOfMemoryError: there is too little memory, even after dropping what was kept from other shapes.
        """
        c, capacity, batch = conditions, step_capacity(len(schedule)), conditions.masks.batch
        layout = Layout(
            text=c.prompt_embeds.shape[1],
            image=c.masks.tokens,
            condition=c.masks.tokens,
            visibility=Visibility.of(self.model, c.condition_scale),
            add_cond_attn=self.model.add_cond_attn,
        )
        fast = c.fast or FastConfig()
        holds = {"extrapolates": fast.extrapolates, "keeps_condition": fast.keeps_condition, "adapts": fast.adapts}
        others = (self.styles.shape, c.kept is None, *holds.values())
        shapes = {kind: (batch, capacity, layout, kind, *others) for kind in (Bank, Fused)}
        self._runner = None  # if its shapes are not kept, this frees its buffers before new ones are made
        inputs = with_room(
            lambda: self._inputs(c, schedule, capacity, shapes),
            lambda: self._runners.give_up_others(shapes.values()),
        )
        self._runner = self._runners.get(
            shapes[type(inputs.mixture)],
            inputs,
            lambda: Step(self.styles.beside(self.transformer), self.mogle, inputs, layout, self.ops, **holds),
        )
        self.styles.fill(self._runner.step.transformer)
        self._position, self._course = Position(len(schedule)), course_of(c.fast, schedule, batch)

    def _inputs(
        self, c: Conditions, schedule: Schedule, capacity: int, shapes: Mapping[type[Bank | Fused], Hashable]
    ) -> StepInputs:
        """Compute what no step changes. shapes: the run's keys in `Runners`, by the type of the mixture."""

        def of_steps(rows: Tensor, filler: float = 0.0) -> Tensor:
            return with_further_rows(rows, capacity, filler)

        prompt_embeds = c.prompt_embeds.to(self.device, self.dtype)
        pooled = c.pooled_prompt_embeds.to(self.device, self.dtype)
        batch, ids = c.masks.batch, token_ids(c.grid)
        moved = condition_ids(ids, c.position_delta, c.position_scale)
        joint_ids = torch.cat([ids.new_zeros(prompt_embeds.shape[1], 3), ids, moved])
        mixture = self.mogle.prepare(c.masks.to(self.device, self.dtype), self.ops, self._mixture, len(schedule))
        time_table = self.mogle.time_table(schedule.timesteps.to(self.device))
        made_from = (
            of_steps(schedule.model_timesteps.to(self.device), NO_TIMESTEP),
            torch.tensor(c.guidance_scale * 1000.0, dtype=torch.float32, device=self.device),
            pooled.expand(batch, -1).clone(),  # a later run overwrites it, so it must not be the caller's tensor
            torch.tensor(self.styles.version, device=self.device),
        )
        sequence = prompt_embeds.expand(batch, -1, -1).transpose(0, 1)
        text, more = self.context_embedder(sequence), self.styles.change("context_embedder", sequence)
        inputs = StepInputs(
            mixture=mixture,
            time_table=None if time_table is None else of_steps(time_table),
            text=text if more is None else text + more,
            modulation=self._modulation(made_from, len(schedule), self._runners.find(shapes[type(mixture)])),
            modulation_of=made_from,
            rope=self.ops.rope_buffer(rope_table(joint_ids.to(self.device), self.config.axes_dims_rope)),
            sigma_steps=of_steps(schedule.sigmas.diff().to(self.device)),
            log_scale=log_scale_of(c.condition_scale, self.device),
            kept=None if c.kept is None else c.kept.to(self.device, self.dtype).for_steps(capacity),
        )
        self.weights.release("transformer.context_embedder.weight")  # no step needs it
        return inputs

    def _modulation(
        self, made_from: tuple[Tensor, Tensor, Tensor, Tensor], steps: int, last: Step | None
    ) -> ModulationTables:
        """The modulation tables of the run. Those of the last run of the same shapes are reused if they were made from
        the same inputs: their weights are a quarter of the model's and are not kept in memory."""
        if last is not None and all(map(torch.equal, made_from, last.inputs.modulation_of)):
            return last.inputs.modulation
        known = self.tables.find(made_from)
        if known is not None:
            return known
        (every, guidance, pooled, _), capacity = made_from, len(made_from[0])
        taken = guidance.expand(len(pooled)) if self.config.guidance_embeds else None
        # There is one more timestep than the loop has: 0 for the condition, whose modulation is constant.
        timesteps = F.pad(every[:steps], (0, 1))
        temb = plain = time_embedding(timesteps, taken, pooled, self.weights)
        if self.styles.acts_within("time_text_embed."):  # only for the steps; the condition keeps the plain one
            temb = time_embedding(timesteps, taken, pooled, self.weights, self.styles.change)
        tables = modulation_tables(
            self.config,
            temb[:-1],
            plain[-1],
            self.weights,
            latent_lora=self.model.latent_lora,
            capacity=capacity,
            change=self.styles.change,
        )
        self.tables.keep(made_from, tables)
        return tables

    @settled()
    @torch.inference_mode()
    def condition(self, latents: Tensor, k: int) -> Tensor:
        """The condition tokens of step k: [B, N, 64] -> [B, N, 64]."""
        self._enter(latents, k)
        self.prepared.condition()
        return _image_major(self.prepared.buffers.condition)

    @settled()
    @torch.inference_mode()
    def velocity(self, latents: Tensor, condition: Tensor, k: int) -> Tensor:
        """The transformer's output in step k for the given condition tokens: [B, N, 64]."""
        self._enter(latents, k)
        self.prepared.buffers.condition.copy_(condition.transpose(0, 1))
        self.prepared.velocity()
        return _image_major(self.prepared.buffers.velocity)

    def step(self, latents: Tensor, k: int) -> Tensor:
        """The velocity at step k of the prepared run: [B, N, 64] -> [B, N, 64]."""
        return self.velocity(latents, self.condition(latents, k), k)

    @settled()
    @torch.inference_mode()
    def start(self, latents: Tensor, k: int = 0) -> None:
        """Set the latents, [B, N, 64], and go to step k. Unless they are those that the last step left, this step is
        computed whatever the mask says, since nothing that was kept belongs to them.

        Raises:
            IndexError: the schedule has no step k.
        """
        runner, given = self._prepared_runner(), latents.transpose(0, 1)
        self._position.go_to(k)
        if not (self._course.may_go_on(k) and torch.equal(given, self.prepared.buffers.latents)):
            self._course.begin(k)
            runner.step.forget()
        runner.start(given, k)

    def _enter(self, latents: Tensor, k: int) -> None:
        """Start at step k, which must exist, and select its rows of the tables."""
        self.start(latents, k)
        self._position.next_step()
        self.prepared.select()

    @settled()
    @torch.inference_mode()
    def advance(self) -> None:
        """Run one step of the loop, including the Euler update.

        Raises:
            IndexError: all steps of the schedule are done.
        """
        runner, k = self._prepared_runner(), self._position.next_step()
        way = self._course.way(k)
        try:
            runner.advance(way)
        except BaseException:
            self._course.begin(k)  # what is kept may be half written
            raise
        self._position.go_to(k + 1)
        self._course.done(k, runner.step.changes() if any(way.fresh) else ())

    @property
    def computed_steps(self) -> int:
        """How many steps were computed since the run was prepared."""
        return self._course.computed

    @property
    def condition_steps(self) -> int:
        """How many of these steps computed the condition too."""
        return self._course.with_condition

    @property
    def execution(self) -> str:
        """How steps are run, see `Runner`."""
        return "not prepared" if self._runner is None else self._runner.execution

    def latents(self) -> Tensor:
        """A copy of the latents after the last `advance`: [B, N, 64]."""
        return _image_major(self.prepared.buffers.latents)

    @property
    def prepared(self) -> Step:
        """The step of the prepared run."""
        return self._prepared_runner().step

    def _prepared_runner(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("prepare() must be called before a step")
        return self._runner


def _size(number: int) -> str:
    """A number of bytes as a readable text."""
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _image_major(x: Tensor) -> Tensor:
    """[N, B, C] -> [B, N, C], a copy."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)
