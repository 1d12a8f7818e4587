"""Train the demo checkpoint's diffusion model: base, branch LoRA, experts and gate in one stage, by flow matching.

    python -m examples.demo_checkpoint.train --minutes 60 --bundle mogle_rt/data/demo.safetensors

It reads from build/demo/ the latents (made by `latents`, which may still add to them), the text encoders (by
`train_text`) and the VAE (by `train_vae`). A batch holds pictures of one size, and the sizes take turns at random. After an
interruption training goes on from its last saved state. ``--from-bundle`` starts from the weights of a bundle alone,
without the optimiser's state. With ``--guide`` too, a model that embeds guidance is made from this bundle, as the last of
all trainings. ``--scalar-gate`` trains the paper's ablation, for `benchmarks.ablations`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.demo_checkpoint.export import export, read_weights
from examples.demo_checkpoint.latents import BLACK, LARGE, MIDDLE, SLIM, SQUARE, TALL
from examples.demo_checkpoint.model import CONFIG, FaceMogle, load_parts
from examples.demo_checkpoint.muon import Muon
from examples.demo_checkpoint.shards import Batch, Shards, no_mask
from examples.demo_checkpoint.train_text import TOKENS, Reader, captions
from examples.demo_checkpoint.training import PRODUCTS, Average, Clock, Team, in_team, learning_rate, save_state
from mogle_rt.config import VAE_SCALE
from mogle_rt.encoders.vae import unpack_latents

TOKENS_OF_SMALLEST = 64  # image tokens of a picture of 128 x 128; a step has as many tokens whatever its size
SIZE_SHARES = {SQUARE: 0.5, MIDDLE: 0.27, SLIM: 0.08, TALL: 0.07, LARGE: 0.08}
SHIFT = 0.4675  # the mean of the logit-normal noise levels, which is FLUX's shift at 64 tokens
HIGH = 0.25  # the share of noise levels drawn evenly from 0.8 to 1, where colours are decided
REGION_WEIGHT = 0.5  # the weight of the error of region averages, see `flow_loss`
GUIDANCE = (1.0, 7.0)  # least and most, which `GuidedLoss` trains for
NO_MASK = 0.2  # the share without mask, for which faces are hardest to draw
DROPPED = 0.1  # the share without text, and the share with some regions only
ROUGH = 0.5  # the share of masks that are rough, of those that have a rough version
MEASURE_EVERY, SAVE_EVERY = 200, 100  # steps


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels: most are logit-normal, and some are drawn evenly from the highest."""
    sigma = torch.sigmoid(torch.randn(count, generator=generator) + SHIFT)
    high = 0.8 + 0.2 * torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < HIGH, high, sigma)


def drop_masks(index: Tensor, generator: torch.Generator) -> Tensor:
    """The rows of condition pictures after some were dropped: a whole mask (which becomes background), or some regions."""

    def chance(*shape: int, below: float) -> Tensor:
        return torch.rand(*shape, generator=generator) < below

    B = len(index)
    regions = chance(B, 1, below=DROPPED) & chance(B, index.shape[1], below=0.3)
    regions[:, 0] = False
    index = torch.where(regions, BLACK, index)
    return torch.where(chance(B, 1, below=NO_MASK), no_mask(), index)


class Prompts:
    """New captions for each batch, as embeddings. Captions vary, so no picture is seen with the same one again."""

    def __init__(self, reader: Reader, seed: list[int]) -> None:
        self.reader, self.rng = reader, np.random.default_rng(seed)
        self.nothing = [part[0] for part in self._read([""])]

    @torch.no_grad()
    def _read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return self.reader(texts)

    def __call__(self, batch: Batch, generator: torch.Generator, *, drop: bool) -> tuple[Tensor, Tensor]:
        """T5's sequence [B, T, J] and CLIP's pooled vector [B, P]."""
        sequence, pooled = self._read(captions(batch.people, self.rng)[0])
        if drop:
            silent = torch.rand(len(batch.faces), generator=generator) < DROPPED
            sequence = torch.where(silent[:, None, None], self.nothing[0], sequence)
            pooled = torch.where(silent[:, None], self.nothing[1], pooled)
        return sequence, pooled


def flow_loss(
    model: nn.Module, batch: Batch, text: tuple[Tensor, Tensor], rope: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The mean squared error of the velocity, plus that of its averages over the mask's regions.

    A region's average is its colour. It is a small part of the first error, and the slowest part to be learned. Both
    errors are least for the same velocity, which is the expected one.
    """
    x = batch.faces
    sigma = noise_levels(len(x), generator)
    noise = torch.randn(x.shape, generator=generator)
    noisy = torch.lerp(x, noise, sigma[:, None, None])
    with torch.autocast("cpu", PRODUCTS, enabled=PRODUCTS.itemsize < 4):
        velocity = model(noisy, sigma, batch.masks, *text, rope, torch.ones(len(x)))
    return errors(velocity.float() - (noise - x), batch)


def errors(error: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean square of a velocity's error [B, N, 64], and that of its averages over the mask's regions."""
    height, width = (2 * VAE_SCALE * side for side in batch.grid)
    cells = unpack_latents(error, height, width).flatten(2)  # [B, 16, 4 N]
    averages = batch.regions @ cells.mT  # [B, 19, 16]
    present = (batch.regions.sum(-1) > 0).sum()
    return error.square().mean(), averages.square().sum() / (present * averages.shape[-1])


Loss = Callable[[nn.Module, Batch, tuple[Tensor, Tensor], Tensor, torch.Generator], tuple[Tensor, Tensor]]


class GuidedLoss:
    """In the place of `flow_loss`: a student that embeds guidance learns what its teacher would draw with guidance.

    For a guidance w the student's velocity shall be v0 + w (v - v0), where v is the teacher's velocity, and v0 its
    velocity without the prompt; where there is no prompt, without the mask (Ho & Salimans 2022, Meng et al. 2023). So one
    step costs as much with guidance as without it, as in FLUX.1-dev.

    Args:
        teacher: does not change. nothing: the embeddings of the empty prompt.
    """

    def __init__(self, teacher: FaceMogle, nothing: list[Tensor]) -> None:
        self.teacher, self.nothing = teacher.eval().requires_grad_(False), nothing

    def __call__(
        self, model: nn.Module, batch: Batch, text: tuple[Tensor, Tensor], rope: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        x, B = batch.faces, len(batch.faces)
        sigma = noise_levels(B, generator)
        noisy = torch.lerp(x, torch.randn(x.shape, generator=generator), sigma[:, None, None])
        guidance = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(B, generator=generator)
        sequence, pooled = text
        silent = (pooled == self.nothing[1]).all(1)
        masks = torch.where(silent[:, None, None, None], batch.nothing, batch.masks)
        without = (self.nothing[0].expand_as(sequence), self.nothing[1].expand_as(pooled))
        with torch.autocast("cpu", PRODUCTS, enabled=PRODUCTS.itemsize < 4):
            with torch.no_grad():
                told = self.teacher(noisy, sigma, batch.masks, sequence, pooled, rope).float()
                untold = self.teacher(noisy, sigma, masks, *without, rope).float()
            velocity = model(noisy, sigma, batch.masks, sequence, pooled, rope, guidance)
        return errors(velocity.float() - torch.lerp(untold, told, guidance[:, None, None]), batch)


@torch.no_grad()
def evaluate(model: FaceMogle, data: Shards, reader: Reader) -> dict[str, list[float]]:
    """The losses on held-out renders by size, always with the same noise and captions."""
    found = {}
    for size in data.sizes():
        generator, prompts = torch.Generator().manual_seed(7), Prompts(reader, [2])
        losses = [
            torch.stack(flow_loss(model, b, prompts(b, generator, drop=False), model.rope(TOKENS, b.grid), generator))
            for b in data.all(size, 8)
        ]
        found[f"{size[0]}x{size[1]}"] = torch.stack(losses).mean(0).numpy().round(4).tolist()
    return found


def pick_size(step: int, there: list[tuple[int, int]]) -> tuple[int, int]:
    """The size of a step's pictures, the same in all processes."""
    shares = np.array([SIZE_SHARES.get(size, 0.0) for size in there])
    return there[np.random.default_rng([3, step]).choice(len(there), p=shares / shares.sum())]


def train(team: Team, args: argparse.Namespace) -> None:
    """Train, or go on with a training. Process 0 measures, and exports the average of the weights."""
    torch.manual_seed(0)
    reader = Reader(args.folder / "text")
    data = Shards(args.folder / "latents")
    config = dataclasses.replace(CONFIG, num_single_layers=args.singles, guidance_embeds=args.guide)
    model = FaceMogle(config, scalar_gate=args.scalar_gate)
    if args.from_bundle:
        load_parts(model, read_weights(args.from_bundle), grow=True)
    loss_of: Loss = flow_loss
    if args.guide:
        teacher = FaceMogle(dataclasses.replace(config, guidance_embeds=False), scalar_gate=args.scalar_gate)
        load_parts(teacher, read_weights(args.from_bundle))
        loss_of = GuidedLoss(teacher, Prompts(reader, [0]).nothing)
    parameters = list(model.parameters())
    by_adam = [p for n, p in model.named_parameters() if "proj_out" in n or "norm_qk" in n]
    optimizer = Muon(team.share(parameters), lr=args.lr, weight_decay=0.02, adam=by_adam)
    clock, step, done = Clock(args.minutes * 60, until=args.until), 0, 0.0
    state_path = args.folder / f"{args.bundle.stem}.state{team.rank}"
    state = torch.load(state_path, weights_only=True) if state_path.exists() else None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        clock.elapsed, step = state["elapsed"], state["step"]
    watch = Watch(model, reader, args, state) if team.rank == 0 else None
    generator = torch.Generator().manual_seed(1_000_000 * team.rank + step)
    prompts = Prompts(reader, [step, team.rank])
    ropes: dict[tuple[int, int], Tensor] = {}
    if team.rank == 0:
        count = sum(p.numel() for p in parameters)
        print(f"{count:,} parameters, {len(data)} pictures, step {step}", flush=True)
    while done < 1:
        rate = args.lr * learning_rate(done, step, warm_up=150, constant=args.constant)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 if group["muon"] else 0.5)
        if step % SAVE_EVERY == 0:
            data.refresh()
        size = pick_size(step, data.sizes())
        tokens = size[0] * size[1] // (2 * VAE_SCALE) ** 2
        batch = data.draw(
            size, max(1, round(args.batch * TOKENS_OF_SMALLEST / tokens / team.size)), ROUGH, drop_masks, generator
        )
        if batch.grid not in ropes:
            ropes[batch.grid] = model.rope(TOKENS, batch.grid)
        text = prompts(batch, generator, drop=True)
        loss, region_loss = loss_of(model, batch, text, ropes[batch.grid], generator)
        model.zero_grad()
        (loss + REGION_WEIGHT * region_loss).backward()
        team.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        team.exchange(parameters)
        step += 1
        done = team.all(clock.tick())
        last = done >= 1
        if watch:
            watch.average.update(model)
        if step % SAVE_EVERY == 0 or last:
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(
                state_path, tensors | (watch.state() if watch else {}) | {"elapsed": clock.elapsed, "step": step}
            )
        if watch:
            watch(step, clock.elapsed, done, [float(loss.detach()), float(region_loss.detach())])


class Watch:
    """What process 0 does besides training: it averages the weights, prints losses and writes bundles."""

    def __init__(
        self, model: FaceMogle, reader: Reader, args: argparse.Namespace, state: dict[str, Any] | None
    ) -> None:
        self.reader, self.args = reader, args
        self.average = Average(model, 0.998)
        if state is not None:
            self.average.module.load_state_dict(state["average"])
            self.average.count = state["step"]
        self.held_out = Shards(args.folder / "held_out_latents")
        self.losses: list[list[float]] = []

    def state(self) -> dict[str, Any]:
        return {"average": self.average.module.state_dict()}

    def __call__(self, step: int, elapsed: float, done: float, loss: list[float]) -> None:
        self.losses.append(loss)
        if step % 50 == 0:
            print(f"{step} {elapsed:.0f}s {done:.3f} loss {np.mean(self.losses[-50:], 0).round(4)}", flush=True)
        if step % MEASURE_EVERY == 0 or done >= 1:
            print(f"  held out {evaluate(self.average.module, self.held_out, self.reader)}", flush=True)
            export(self.average.module, self.args.folder / "vae", self.args.folder / "text", self.args.bundle)
            print(f"  {self.args.bundle} written at step {step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/demo"))
    parser.add_argument(
        "--minutes", type=float, default=60, help="of training in all; time while stopped doesn't count"
    )
    parser.add_argument("--until", type=float, help="Unix time at which to end, in the place of --minutes")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--constant", type=float, default=0.4, help="the part of training before its rate falls; 1: never"
    )
    parser.add_argument(
        "--singles", type=int, default=CONFIG.num_single_layers, help="single blocks; new ones begin idle"
    )
    parser.add_argument("--from-bundle", type=Path)
    parser.add_argument("--guide", action="store_true", help="distil guidance: the bundle is the teacher")
    parser.add_argument("--scalar-gate", action="store_true", help="one weight an image and expert, not one a token")
    parser.add_argument("--bundle", type=Path, default=Path("build/demo/demo.safetensors"))
    parser.add_argument("--batch", type=int, default=16, help="pictures of 128 pixels in a step; fewer of larger sizes")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.guide and not args.from_bundle:
        parser.error("--guide needs --from-bundle, the teacher")
    in_team(args.processes, train, args)


if __name__ == "__main__":
    main()
