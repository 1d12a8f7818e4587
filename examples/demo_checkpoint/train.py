"""Train the demo checkpoint's diffusion model: base, branch LoRA, experts and gate in one stage, by flow matching.

    python -m examples.demo_checkpoint.train --minutes 60 --bundle mogle_rt/data/demo.safetensors

Reads latents (`latents`), text encoders (`train_text`) and VAE (`train_vae`) below build/demo/. Interrupted, it goes on
from its last saved state; ``--from-bundle`` goes on from the weights of a bundle alone, without the optimiser's state.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.demo_checkpoint.attributes import Attributes
from examples.demo_checkpoint.export import export, read_weights
from examples.demo_checkpoint.latents import BLACK, WHITE
from examples.demo_checkpoint.model import FaceMogle, load_parts
from examples.demo_checkpoint.muon import Muon
from examples.demo_checkpoint.renders import Renders
from examples.demo_checkpoint.train_text import TOKENS, Reader, captions
from examples.demo_checkpoint.training import Average, Clock, learning_rate, save_state

BATCH = 16
CAPTIONS = 4  # of each picture
SHIFT = 0.4675  # mean of the logit-normal noise levels: FLUX's shift at 64 tokens
HIGH = 0.25  # share of noise levels drawn evenly from 0.8 to 1, where global colours are decided
DROPPED = 0.1  # share without text, without mask, with some regions only
EVERY = 200  # steps between evaluations


@dataclass
class Data:
    """Latents and embeddings of n renders: see `latents.encode`. sequence: [n, K, T, J], pooled: [n, K, P]."""

    faces: Tensor
    rows: Tensor
    index: Tensor
    sequence: Tensor
    pooled: Tensor
    nothing: tuple[Tensor, Tensor]  # the empty prompt's

    @classmethod
    @torch.no_grad()
    def load(cls, latents: Path, renders: Path, reader: Reader, per_picture: int, seed: int) -> Data:
        stored = torch.load(latents, weights_only=True)
        count = len(stored["faces"])
        people = [Attributes(**a) for a in Renders(renders).attributes[:count]]
        rng = np.random.default_rng(seed)
        sequences, vectors = [], []
        for start in range(0, count, 64):
            some = people[start : start + 64]
            made = [reader(captions(some, rng)[0]) for _ in range(per_picture)]
            sequences.append(torch.stack([s for s, _ in made], 1).half())
            vectors.append(torch.stack([v for _, v in made], 1))
        sequence, pooled = reader([""])
        return cls(
            stored["faces"], stored["rows"], stored["index"], torch.cat(sequences), torch.cat(vectors),
            (sequence[0], pooled[0]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.faces)

    def text(self, i: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        k = torch.randint(self.sequence.shape[1], (len(i),), generator=generator)
        return self.sequence[i, k].float(), self.pooled[i, k]


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Logit-normal, and some evenly from the highest."""
    sigma = torch.sigmoid(torch.randn(count, generator=generator) + SHIFT)
    high = 0.8 + 0.2 * torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < HIGH, high, sigma)


def drop_masks(index: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of condition pictures after dropping: the whole mask (it is all background then), or some of its regions."""

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
    model: nn.Module, data: Data, i: Tensor, rope: tuple[Tensor, Tensor], generator: torch.Generator, *, drop: bool
) -> Tensor:
    """Mean squared error of the velocity, for renders ``i``."""
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
    velocity = model(noisy, sigma, data.rows[index].float(), sequence, pooled, rope)
    return (velocity - (noise - x)).square().mean()


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, rope: tuple[Tensor, Tensor]) -> float:
    """Loss on held-out renders, always with the same noise."""
    generator = torch.Generator().manual_seed(7)
    parts = torch.arange(len(data)).split(32)
    return sum(float(flow_loss(model, data, i, rope, generator, drop=False)) * len(i) for i in parts) / len(data)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    reader = Reader(args.folder / "text")
    data = Data.load(args.folder / "train_latents.pt", args.folder / "train.npz", reader, CAPTIONS, seed=1)
    held_out = Data.load(args.folder / "held_out_latents.pt", args.folder / "held_out.npz", reader, 1, seed=2)
    model = FaceMogle()
    if args.from_bundle:
        load_parts(model, read_weights(args.from_bundle))
    by_adam = [p for n, p in model.named_parameters() if "proj_out" in n or "norm_qk" in n]
    optimizer = Muon(model.parameters(), lr=args.lr, weight_decay=0.02, adam=by_adam)
    average = Average(model, 0.998)
    rope = model.rope(TOKENS, (8, 8))
    clock, step, done = Clock(args.minutes * 60), 0, 0.0
    state_path = args.folder / "train.state"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.module.load_state_dict(state["average"])
        average.count = step = state["step"]
        clock.elapsed = state["elapsed"]
    generator = torch.Generator().manual_seed(1000 + step)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(data)} renders, {len(data.rows)} condition pictures, step {step}", flush=True)
    losses: list[float] = []
    saved = exported = clock.elapsed
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(done, step, warm_up=150, constant=0.4) * (1 if group["muon"] else 0.5)
        i = torch.randint(len(data), (BATCH,), generator=generator)
        loss = flow_loss(model, data, i, rope, generator, drop=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        losses.append(float(loss))
        step += 1
        done = clock.tick()
        if step % 50 == 0:
            print(f"{step} {clock.elapsed:.0f}s {done:.3f} loss {np.mean(losses[-50:]):.4f}", flush=True)
        if step % EVERY == 0:
            print(f"  held out {evaluate(average.module, held_out, rope):.4f}", flush=True)
        if clock.elapsed - saved > 180 or done >= 1:
            saved = clock.elapsed
            tensors = {"model": model, "optimizer": optimizer, "average": average.module}
            state = {name: part.state_dict() for name, part in tensors.items()}
            save_state(state_path, state | {"elapsed": clock.elapsed, "step": step})
        if clock.elapsed - exported > args.export_every * 60 or done >= 1:
            exported = clock.elapsed
            export(average.module, args.folder / "vae", args.folder / "text", args.bundle)
            print(f"  {args.bundle} written at step {step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/demo"))
    parser.add_argument("--minutes", type=float, default=60, help="of training in all; time while stopped doesn't count")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--from-bundle", type=Path)
    parser.add_argument("--bundle", type=Path, default=Path("build/demo/demo.safetensors"))
    parser.add_argument("--export-every", type=float, default=5, help="minutes")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
