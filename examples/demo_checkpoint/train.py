"""Train the demo checkpoint's diffusion model: base, branch LoRA, experts and gate in one stage, by flow matching.

    python -m examples.demo_checkpoint.train --minutes 60 --bundle mogle_rt/data/demo.safetensors

It reads from build/demo/ the latents (made by `latents`), the text encoders (by `train_text`) and the VAE (by
`train_vae`). After an interruption it goes on from its last saved state. ``--from-bundle`` starts from the weights of a
bundle alone, without the optimiser's state. ``--scalar-gate`` trains the paper's ablation, for `benchmarks.ablations`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.demo_checkpoint.attributes import Attributes
from examples.demo_checkpoint.export import export, read_weights
from examples.demo_checkpoint.latents import BLACK, WHITE
from examples.demo_checkpoint.model import FaceMogle, load_parts
from examples.demo_checkpoint.muon import Muon
from examples.demo_checkpoint.renders import Renders
from examples.demo_checkpoint.train_text import TOKENS, Reader, captions
from examples.demo_checkpoint.training import PRODUCTS, Average, Clock, Team, in_team, learning_rate, save_state
from mogle_rt.config import NUM_CLASSES, VAE_SCALE
from mogle_rt.encoders.vae import unpack_latents

BATCH = 16
CAPTIONS = 4  # for each picture
SHIFT = 0.4675  # the mean of the logit-normal noise levels, which is FLUX's shift at 64 tokens
HIGH = 0.25  # the share of noise levels drawn evenly from 0.8 to 1, where colours are decided
SIDE = 16  # of the square of latent cells
REGION_WEIGHT = 0.5  # the weight of the error of region averages, see `flow_loss`
DROPPED = 0.1  # the share without text, the share without mask, and the share with some regions only
MEASURE_EVERY, SAVE_EVERY = 100, 100  # steps


@dataclass
class Data:
    """Latents and embeddings of n renders: see `latents.encode`.

    Attributes:
        regions: [n, 19, 256], weights that average over each region's latent cells; 0 for regions of fewer than 3 cells.
        sequence: [n, K, T, J], pooled: [n, K, P], of K captions.
        nothing: the embeddings of the empty prompt.
    """

    faces: Tensor
    rows: Tensor
    index: Tensor
    regions: Tensor
    sequence: Tensor
    pooled: Tensor
    nothing: tuple[Tensor, Tensor]

    @classmethod
    @torch.no_grad()
    def load(cls, latents: Path, renders: Path, reader: Reader, per_picture: int, seed: int) -> Data:
        stored = torch.load(latents, weights_only=True)
        count = len(stored["faces"])
        data = Renders(renders)
        people = [Attributes(**a) for a in data.attributes[:count]]
        rng = np.random.default_rng(seed)
        sequences, vectors = [], []
        for start in range(0, count, 64):
            some = people[start : start + 64]
            made = [reader(captions(some, rng)[0]) for _ in range(per_picture)]
            sequences.append(torch.stack([s for s, _ in made], 1).half())
            vectors.append(torch.stack([v for _, v in made], 1))
        sequence, pooled = reader([""])
        return cls(
            stored["faces"], stored["rows"], stored["index"], region_averages(data.labels[:count]),
            torch.cat(sequences), torch.cat(vectors), (sequence[0], pooled[0]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.faces)

    def text(self, i: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        k = torch.randint(self.sequence.shape[1], (len(i),), generator=generator)
        return self.sequence[i, k].float(), self.pooled[i, k]


def region_averages(labels: NDArray[np.uint8]) -> Tensor:
    """[n, H, W] -> [n, 19, H / 8 * W / 8], see `Data`."""
    cells = torch.stack([F.avg_pool2d(torch.from_numpy(labels == c).float(), VAE_SCALE) for c in range(NUM_CLASSES)], 1)
    inside = (cells > 0.5).flatten(2).float()
    count = inside.sum(-1, keepdim=True)
    return torch.where(count >= 3, inside / count.clamp(min=1), 0)


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
    nothing = torch.full_like(index[0], BLACK)
    nothing[1] = WHITE
    return torch.where(chance(B, 1, below=DROPPED), nothing, index)


def flow_loss(
    model: nn.Module, data: Data, i: Tensor, rope: Tensor, generator: torch.Generator, *, drop: bool
) -> tuple[Tensor, Tensor]:
    """The mean squared error of the velocity for renders ``i``, plus that of its averages over the mask's regions.

    A region's average is its colour. It is a small part of the first error, and the slowest part to be learned. Both
    errors are least for the same velocity, which is the expected one.
    """
    x, index = data.faces[i].float(), data.index[i]
    sequence, pooled = data.text(i, generator)
    if drop:
        index = drop_masks(index, generator)
        silent = torch.rand(len(i), generator=generator) < DROPPED
        sequence = torch.where(silent[:, None, None], data.nothing[0], sequence)
        pooled = torch.where(silent[:, None], data.nothing[1], pooled)
    sigma = noise_levels(len(i), generator)
    noise = torch.randn(x.shape, generator=generator)
    noisy = torch.lerp(x, noise, sigma[:, None, None])
    with torch.autocast("cpu", PRODUCTS, enabled=PRODUCTS.itemsize < 4):
        velocity = model(noisy, sigma, data.rows[index].float(), sequence, pooled, rope)
    error = velocity.float() - (noise - x)
    cells = unpack_latents(error, 8 * SIDE, 8 * SIDE).flatten(2)  # [B, 16, 256]
    averages = data.regions[i] @ cells.mT  # [B, 19, 16]
    present = (data.regions[i].sum(-1) > 0).sum()
    return error.square().mean(), averages.square().sum() / (present * averages.shape[-1])


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, rope: Tensor) -> list[float]:
    """The losses on held-out renders, always with the same noise."""
    generator = torch.Generator().manual_seed(7)
    parts = torch.arange(len(data)).split(32)
    losses = [torch.stack(flow_loss(model, data, i, rope, generator, drop=False)) for i in parts]
    return torch.stack(losses).mean(0).tolist()


def train(team: Team, args: argparse.Namespace) -> None:
    """Train, or go on with a training. Process 0 measures, and exports the average of the weights."""
    torch.manual_seed(0)
    reader = Reader(args.folder / "text")
    data = Data.load(args.folder / "train_latents.pt", args.folder / "train.npz", reader, CAPTIONS, seed=1)
    model = FaceMogle(scalar_gate=args.scalar_gate)
    if args.from_bundle:
        load_parts(model, read_weights(args.from_bundle))
    parameters = list(model.parameters())
    by_adam = [p for n, p in model.named_parameters() if "proj_out" in n or "norm_qk" in n]
    optimizer = Muon(team.share(parameters), lr=args.lr, weight_decay=0.02, adam=by_adam)
    rope = model.rope(TOKENS, (8, 8))
    clock, step, done = Clock(args.minutes * 60, until=args.until), 0, 0.0
    state_path = args.folder / f"{args.bundle.stem}.state{team.rank}"
    state = torch.load(state_path, weights_only=True) if state_path.exists() else None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        clock.elapsed, step = state["elapsed"], state["step"]
    watch = Watch(model, reader, rope, args, state) if team.rank == 0 else None
    generator = torch.Generator().manual_seed(1_000_000 * team.rank + step)
    if team.rank == 0:
        count = sum(p.numel() for p in parameters)
        print(f"{count:,} parameters, {len(data)} renders, {len(data.rows)} pictures, step {step}", flush=True)
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(done, step, warm_up=150, constant=0.4) * (1 if group["muon"] else 0.5)
        i = torch.randint(len(data), (BATCH // team.size,), generator=generator)
        loss, region_loss = flow_loss(model, data, i, rope, generator, drop=True)
        model.zero_grad()
        (loss + REGION_WEIGHT * region_loss).backward()
        team.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        team.exchange(parameters)
        step += 1
        done = team.all(clock.tick())
        last = done >= 1
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
        self,
        model: FaceMogle,
        reader: Reader,
        rope: Tensor,
        args: argparse.Namespace,
        state: dict[str, Any] | None,
    ) -> None:
        self.model, self.rope, self.args = model, rope, args
        self.average = Average(model, 0.998)
        if state is not None:
            self.average.module.load_state_dict(state["average"])
            self.average.count = state["step"]
        self.held_out = Data.load(args.folder / "held_out_latents.pt", args.folder / "held_out.npz", reader, 1, seed=2)
        self.losses: list[list[float]] = []

    def state(self) -> dict[str, Any]:
        return {"average": self.average.module.state_dict()}

    def __call__(self, step: int, elapsed: float, done: float, loss: list[float]) -> None:
        self.average.update(self.model)
        self.losses.append(loss)
        if step % 50 == 0:
            print(f"{step} {elapsed:.0f}s {done:.3f} loss {np.mean(self.losses[-50:], 0).round(4)}", flush=True)
        if step % MEASURE_EVERY == 0 or done >= 1:
            print(f"  held out {np.round(evaluate(self.average.module, self.held_out, self.rope), 4)}", flush=True)
        if step % SAVE_EVERY == 0 or done >= 1:
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
    parser.add_argument("--from-bundle", type=Path)
    parser.add_argument("--scalar-gate", action="store_true", help="one weight an image and expert, not one a token")
    parser.add_argument("--bundle", type=Path, default=Path("build/demo/demo.safetensors"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    in_team(args.processes, train, args)


if __name__ == "__main__":
    main()
