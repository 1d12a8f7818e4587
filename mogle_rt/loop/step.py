"""One denoising step, as a fixed sequence of operations over fixed buffers.

Everything that depends on the shapes of a run (views, rows, switches) is worked out once, when a `Step` is made. After
that, a step reads and writes the same memory each time, never waits and has no branches that depend on data. So it can
be captured in a CUDA graph, and one graph serves every step, because the step's number is in a buffer too. (On a CPU,
where nothing is captured, a library may allocate the result of a product.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mogle_rt.fast.course import Kind, Way
from mogle_rt.loop.blend import Blend
from mogle_rt.loop.buffers import Buffers, StepInputs, shape_and_place, tensors_of
from mogle_rt.loop.chain import Chain
from mogle_rt.loop.reuse import Difference, Followed, KeptCondition
from mogle_rt.model.layout import Layout
from mogle_rt.model.mixture import MixtureOfExperts
from mogle_rt.model.transformer import Transformer
from mogle_rt.ops.contract import Ops


@dataclass(frozen=True)
class Section:
    """A part of a step that needs the weights of at most one streamed sublayer.

    Attributes:
        links: the sublayers that it computes, by their place. streamed: the number of the first of them among the
            streamed ones; None if it is not streamed.
        first, last: whether the step begins or ends with this section.
        kind: what the step computes.
    """

    links: range
    streamed: int | None = None
    first: bool = False
    last: bool = False
    kind: Kind = Kind.WHOLE


class Step:
    """A step for runs of one shape. `load` fills its inputs for another run; each call of `advance` runs one step.

    Args:
        transformer, mogle: the weights.
        inputs: the inputs of the first run. Inputs of later runs, of the same shapes, are copied over them.
        layout: the rows and the switches.
        ops: see `mogle_rt.ops.choice`.
        extrapolates: whether steps that aren't computed need the difference of the last two velocities.
        keeps_condition: whether steps are asked for that leave out the condition's rows.
        adapts: whether each image takes the computed velocity or its own expected one, as the host chooses.
    """

    def __init__(
        self,
        transformer: Transformer,
        mogle: MixtureOfExperts,
        inputs: StepInputs,
        layout: Layout,
        ops: Ops,
        *,
        extrapolates: bool = False,
        keeps_condition: bool = False,
        adapts: bool = False,
    ) -> None:
        self.transformer, self.mogle, self.inputs, self.ops = transformer, mogle, inputs, ops
        self.buffers = b = Buffers(transformer, layout, inputs.text.shape[1], inputs.log_scale)
        self.modulation = inputs.modulation.buffers()
        self.time = None if inputs.time_table is None else inputs.time_table[:1].clone()
        self.sigma_step = inputs.sigma_steps[:1].clone()
        self.blend = None if inputs.kept is None else Blend(inputs.kept)
        self.difference = Difference(b.velocity) if extrapolates else None
        self.followed = Followed(b.velocity, batch_dim=1) if adapts else None
        self.kept = KeptCondition(transformer, b, layout, self.modulation) if keeps_condition else None
        rows = None if self.kept is None else self.kept.rows
        parts = (b, inputs.rope, layout, ops, rows)
        self.chains = {Kind.WHOLE: Chain(transformer, self.modulation, *parts)}
        if self.kept is not None:
            parts = (b.without_condition(layout), inputs.rope, layout.without_condition, ops, rows)
            self.chains[Kind.KEPT] = Chain(transformer, self.modulation.without_condition, *parts)
        self.x_text = b.x[: layout.text]
        reused = Section(range(0), first=True, last=True, kind=Kind.REUSED)
        self.sections = {kind: self._cut(kind) for kind in self.chains} | {Kind.REUSED: [reused]}

    def _cut(self, kind: Kind) -> list[Section]:
        """The step, cut where the weights of streamed sublayers are needed. Without any it is one section."""
        count, streamed = len(self.chains[kind].links), self.transformer.streamed
        starts = [0, *streamed]
        return [
            Section(
                range(start, end), streamed.get(start) if number else None, number == 0, number == len(streamed), kind
            )
            for number, (start, end) in enumerate(zip(starts, [*streamed, count], strict=True))
        ]

    def load(self, inputs: StepInputs) -> None:
        """Copy another run's inputs over the present ones, so that addresses stay the same.

        Raises:
            ValueError: a shape, dtype or device differs.
        """
        pairs = list(zip(tensors_of(self.inputs), tensors_of(inputs), strict=True))
        for mine, other in pairs:
            if (mine.shape, mine.dtype, mine.device) != (other.shape, other.dtype, other.device):
                raise ValueError(
                    f"step inputs must be {shape_and_place(mine)} as in the first run, got {shape_and_place(other)}"
                )
        # An interrupt during the copies must not leave tables that look valid. NaN marks them as belonging to no run.
        self.inputs.modulation_of[0].fill_(torch.nan)
        for mine, other in pairs:
            if mine is not other:
                mine.copy_(other)
        self.inputs.modulation.fill_condition(self.modulation)

    def addresses(self) -> list[int]:
        """The addresses of all tensors that the step reads or writes, except the weights."""
        held = (*self._own(), *tensors_of(list(vars(self.buffers).values())))
        return [t.data_ptr() for t in held]

    def _own(self) -> list[Tensor]:
        """The inputs, and the buffers outside of `Buffers`."""
        blend = [] if self.blend is None else self.blend.buffers
        difference = [] if self.difference is None else self.difference.buffers
        kept = [] if self.kept is None else self.kept.buffers
        followed = [] if self.followed is None else self.followed.buffers
        return tensors_of((self.inputs, self.modulation, self.time, self.sigma_step, blend, difference, kept, followed))

    @property
    def carried(self) -> list[Tensor]:
        """What a step leaves for the next one."""
        b = self.buffers
        others = [part.buffers for part in (self.difference, self.followed) if part is not None]
        return [b.latents, b.index, b.velocity, *chain.from_iterable(others)]

    def prepare(self, way: Way) -> None:
        """Set what the next step, which is done in this way, reads besides its index."""
        if self.followed is not None:
            self.followed.choose(way)
        elif self.difference is not None and way.kind is Kind.REUSED:
            self.difference.weight.fill_(way.weight)

    def changes(self) -> list[float]:
        """See `Followed.changes`."""
        return [] if self.followed is None else self.followed.changes()

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs and buffers, which only this step holds. Weights are not counted."""
        return sum(t.nbytes for t in self._own()) + self.buffers.nbytes

    def forget(self) -> None:
        """Forget the velocities of earlier steps, whose latents were others."""
        if self.difference is not None:
            self.buffers.velocity.zero_()
        if self.followed is not None:
            self.followed.forget()

    def seek(self, k: int) -> None:
        """Go to step k."""
        self.buffers.index.fill_(k)

    def select(self) -> None:
        """Copy the table rows of the step that the index names into the buffers."""
        index, inputs = self.buffers.index, self.inputs
        inputs.modulation.select(index, into=self.modulation)
        if inputs.time_table is not None:
            torch.index_select(inputs.time_table, 0, index, out=self.time)
        self._select_levels()

    def _select_levels(self) -> None:
        """Of these rows, those that an update of the latents needs."""
        torch.index_select(self.inputs.sigma_steps, 0, self.buffers.index, out=self.sigma_step)
        if self.blend is not None:
            self.blend.select(self.buffers.index)

    def condition(self) -> None:
        """Compute the condition tokens from the latents, by gate and mixture."""
        self.mogle(self.buffers.latents, self.inputs.mixture, self.time, self.buffers.condition, self.ops)

    @contextmanager
    def weights_of(self, section: Section) -> Iterator[None]:
        """Keep the weights of the section's streamed sublayer, if it has one, in memory within the context."""
        stream, number = self.transformer.stream, section.streamed
        try:
            if stream is not None and number is not None:
                stream.acquire(number)
            yield
        except BaseException:
            if stream is not None:
                stream.restart()
            raise
        if stream is not None and number is not None:
            stream.release(number)

    def velocity(self) -> None:
        """Compute the velocity from latents and condition tokens, by the transformer."""
        for section in self.sections[Kind.WHOLE]:
            with self.weights_of(section):
                self._transform(section)

    def _transform(self, section: Section) -> None:
        """The part of the transformer that belongs to a section."""
        part = self.chains[section.kind]
        if section.first:
            self.x_text.copy_(self.inputs.text)
            part.begin()
        part.run(section.links)
        if section.last:
            part.end()

    def run(self, section: Section) -> None:
        """Compute a section of the step. Its streamed weights must be in memory, see `weights_of`."""
        if section.kind is Kind.REUSED:
            self._select_levels()
            self._update(self._known())
            return
        if section.first:
            self.select()
            if section.kind is Kind.WHOLE:
                self.condition()
            if self.difference is not None:
                self.difference.before()
        self._transform(section)
        if section.last:
            if self.difference is not None:
                self.difference.after()
            if self.followed is not None:
                self.followed.take(self.buffers.velocity)
            self._update(self.buffers.velocity if self.followed is None else self.followed.velocity())

    def _known(self) -> Tensor:
        """The velocity of a step that isn't computed."""
        if self.followed is not None:
            return self.followed.velocity()
        return self.buffers.velocity if self.difference is None else self.difference.continued()

    def _update(self, velocity: Tensor) -> None:
        """Update the latents, x + (σ' - σ) v, and increase the index."""
        self.buffers.latents.addcmul_(velocity, self.sigma_step)
        if self.blend is not None:
            self.blend(self.buffers.latents)
        self.buffers.index.add_(1)

    def advance(self, kind: Kind = Kind.WHOLE) -> None:
        """Run one step of the loop: compute the velocity, update the latents, and increase the index.

        Args:
            kind: what is computed. All but whole steps need earlier ones of the same run, see `mogle_rt.fast.course`.
        """
        for section in self.sections[kind]:
            with self.weights_of(section):
                self.run(section)
