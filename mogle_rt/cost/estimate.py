"""What a job costs, without weights: the engine's own code runs on the meta device, and every operation is counted.

No formula is used for this engine's cost. Its modules are built without memory, prepared and stepped by the same code
that makes images, on the branches for GPUs. The reference's cost is a ledger instead, see `mogle_rt.cost.reference`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mogle_rt.config import NUM_EXPERTS, PATCH, VAE_SCALE
from mogle_rt.cost.counting import Count, counting
from mogle_rt.cost.job import Job, WeightlessBundle
from mogle_rt.cost.reference import reference_step
from mogle_rt.encoders.vae import DECODE_PIXELS, ENCODE_PIXELS, autoencoder, pictures_at_once, vae_dtype
from mogle_rt.engines.contract import Conditions
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.fast.course import ways_of
from mogle_rt.loop.schedule import make_schedule


@dataclass(frozen=True, kw_only=True)
class JobCost:
    """The cost of one way of doing a job, for all its images together.

    Attributes:
        encode: all pictures of the masks. prepare: what is done once per run. step: one step, with experts and gate,
            transformer and Euler update. decode: latents to pictures.
        steps: the number of steps.
        course: in a fast mode, what its kinds of steps cost, and how many there are of each, by `mogle_rt.fast.course.Kind`.
        resident: bytes of weights that stay in memory. peak: the most bytes in use at once. Both without the text
            encoders, which take ``text`` bytes more.
    """

    encode: Count
    prepare: Count
    step: Count
    decode: Count
    steps: int
    resident: int
    peak: int
    text: int
    course: Mapping[str, tuple[int, Count]] = field(default_factory=dict)

    @property
    def kinds(self) -> list[tuple[int, Count]]:
        """How many steps there are of each kind, and what one of them costs."""
        return list(self.course.values()) or [(self.steps, self.step)]

    @property
    def flops(self) -> int:
        """The FLOPs of the whole job, from masks and prompt embeddings to pictures."""
        steps = sum(count * step.flops for count, step in self.kinds)
        return self.encode.flops + self.prepare.flops + steps + self.decode.flops

    @property
    def peak_with_text(self) -> int:
        """The peak in bytes, including the text encoders."""
        return self.peak + self.text

    def to_dict(self) -> dict[str, Any]:
        """The cost as a dictionary that can be written as JSON."""
        stages = {name: dataclasses.asdict(getattr(self, name)) for name in ("encode", "prepare", "step", "decode")}
        names = ("flops", "resident", "peak", "peak_with_text")
        course = {kind: {"steps": n} | dataclasses.asdict(step) for kind, (n, step) in self.course.items()}
        return stages | {name: getattr(self, name) for name in names} | ({"course": course} if course else {})


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A job's cost for this engine and for the reference, and the parameters and bytes of each part."""

    parameters: dict[str, int]
    nbytes: dict[str, int]
    engine: JobCost
    reference: JobCost


def estimate(job: Job) -> Estimate:
    """Count a job: this engine and the VAE by running them without weights, the reference by its ledger."""
    meta, dtype, flux, batch = torch.device("meta"), job.dtype, job.config.transformer, job.batch

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device=meta, dtype=dtype)

    with counting() as counter:
        bundle = WeightlessBundle(job.config, job.ranks, job.weights)
        engine = TorchEngine(bundle, meta, dtype, job.model, kernels=job.kernels)
        of_vae = vae_dtype(job.config.vae, dtype)
        vae = nn.Module.to(autoencoder(job.config.vae), of_vae).eval()  # diffusers' own `to` prints messages
        parameters = bundle.parameters() | {"vae": sum(p.numel() for p in vae.parameters())}
        resident, weights = counter.live, sum(parameters.values()) * dtype.itemsize
        weights += parameters["vae"] * (of_vae.itemsize - dtype.itemsize)

        def count(run: Callable[[int], object], total: int, at_once: int) -> Count:
            """The cost of ``total`` pictures, when ``at_once`` are run together."""
            result = Count()
            for size, times in ((at_once, total // at_once), (total % at_once, 1)):
                if size and times:
                    counter.take()
                    run(size)
                    result += counter.take() * times
            return result

        def encode(pictures: int) -> None:
            vae.encode(empty(pictures, 3, job.height, job.width).to(of_vae))

        def decode(images: int) -> None:
            vae.decode(empty(images, flux.in_channels // 4, job.height // VAE_SCALE, job.width // VAE_SCALE).to(of_vae))

        encode_alone, decode_alone = count(encode, 1, 1), count(decode, 1, 1)
        pixels = job.height * job.width
        encoded = count(encode, job.pictures * batch, pictures_at_once(meta, pixels, ENCODE_PIXELS))
        conditions = Conditions.from_mask_latents(
            empty(batch, NUM_EXPERTS, job.tokens, flux.in_channels),
            prompt_embeds=empty(batch, job.text_tokens, flux.joint_attention_dim),
            pooled_prompt_embeds=empty(batch, flux.pooled_projection_dim),
            guidance_scale=3.5,
            grid=(job.height // PATCH, job.width // PATCH),
            condition_scale=job.condition_scale,
            fast=job.fast,
        )
        steps = job.steps if job.fast is None else job.fast.steps_of(job.steps)
        schedule = make_schedule(job.config.scheduler, steps, job.tokens)
        counter.take()
        engine.prepare(conditions, schedule)
        prepared = counter.take()
        engine.advance()
        step = counter.take()
        course: dict[str, tuple[int, Count]] = {}
        if job.fast is not None:
            ways = ways_of(job.fast, schedule.sigmas[:-1].tolist())
            for kind, times in Counter(way.kind for way in ways).items():
                with torch.inference_mode():
                    engine.prepared.advance(kind)
                course[kind.value] = (times, counter.take())
        decoded = count(decode, batch, pictures_at_once(meta, pixels, DECODE_PIXELS))

    common: dict[str, Any] = {"steps": job.steps, "text": sum(job.text.values()) * dtype.itemsize}
    mine = JobCost(
        encode=encoded,
        prepare=prepared,
        step=step,
        decode=decoded,
        resident=resident,
        peak=max(c.peak for c in (encoded, prepared, step, decoded)),
        course=course,
        **common,
    )
    ledger = reference_step(job)
    theirs = JobCost(
        encode=encode_alone * (NUM_EXPERTS * batch),
        prepare=Count(),
        step=ledger * batch,
        decode=decode_alone * batch,
        resident=weights,
        peak=weights + max(ledger.peak, max(encode_alone.peak, decode_alone.peak) - resident),
        **common,
    )
    nbytes = {part: count * dtype.itemsize for part, count in (parameters | dict(job.text)).items()}
    nbytes |= bundle.nbytes(dtype)
    return Estimate(parameters=parameters | dict(job.text), nbytes=nbytes, engine=mine, reference=theirs)
