"""Trains the demo checkpoint's VAE on faces, palette masks and binary planes, which come from renders.

    python -m examples.demo_checkpoint.train_vae --data build/demo/train.npz --output build/demo/vae --minutes 18

After an interruption it goes on from its last saved state.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from examples.demo_checkpoint.muon import Muon
from examples.demo_checkpoint.renders import Renders, palette_pictures, pictures, planes, psnr
from examples.demo_checkpoint.training import Clock, Team, in_team, learning_rate, save_state

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 128,
}
SMALL_UNTIL = 0.6  # the part of the training that uses crops of 64 pixels; after it come whole pictures
KL_WEIGHT = 3e-4


def make_vae() -> Any:
    """Make an untrained VAE. With orthogonal samplers and little posterior noise it learns several times faster."""
    vae = AutoencoderKL.from_config(CONFIG)
    for name, weight in vae.named_parameters():
        if ("sampler" in name or "conv_in" in name) and weight.ndim == 4:
            nn.init.orthogonal_(weight)
    with torch.no_grad():
        vae.encoder.conv_out.weight[16:] *= 0.1
        vae.encoder.conv_out.bias[16:] = -5
    return vae.to(memory_format=torch.channels_last)


def batch(data: Renders, count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Crops [count, 3, size, size]: 6 faces for each palette mask and each plane; half are near the middle of the face."""
    crops = []
    S = data.images.shape[1]
    for number, i in enumerate(rng.integers(0, len(data), count)):
        y, x = rng.integers(0, S - size + 1, 2) if number % 2 or size == S else rng.integers(S // 5, S // 2 - S // 8, 2)
        y, x = min(y, S - size), min(x, S - size)
        area = (slice(i, i + 1), slice(y, y + size), slice(x, x + size))
        kind = rng.random()
        if kind < 0.75:
            crop = pictures(data.images[area])
        elif kind < 0.875:
            crop = palette_pictures(data.labels[area])
        else:
            crop = planes(data.labels[area], int(rng.choice(np.unique(data.labels[area]))))
        crops.append(crop.flip(3) if rng.random() < 0.5 else crop)
    return torch.cat(crops).contiguous(memory_format=torch.channels_last)


def train(team: Team, args: argparse.Namespace) -> None:
    """Train, or go on with a training. Process 0 finishes and saves the VAE."""
    data, output = Renders(args.data), args.output
    torch.manual_seed(0)
    vae = make_vae()
    parameters = list(vae.parameters())
    optimizer = Muon(team.share(parameters), lr=args.lr)
    clock, step, done = Clock(args.minutes * 60), 0, 0.0
    state_path = output.with_suffix(f".state{team.rank}")
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        clock.elapsed, step = state["elapsed"], state["step"]
    torch.manual_seed(1000 * step + team.rank)
    rng = np.random.default_rng([step, team.rank])
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(done, step, warm_up=100, constant=0.25)
        count, size = (8, 64) if done < SMALL_UNTIL else (2, 128)
        x = batch(data, count // team.size, size, rng)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + 0.5 * edges + KL_WEIGHT * kl
        optimizer.zero_grad()
        vae.zero_grad()
        loss.backward()
        team.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        team.exchange(parameters)
        step += 1
        done = team.all(clock.tick())
        if step % 100 == 0 and team.rank == 0:
            quality = -10 * float(torch.log10((error.detach() / 2).square().mean() + 1e-8))
            l1, std = float(error.detach().abs().mean()), float(posterior.std.detach().mean())
            print(
                f"{step} {clock.elapsed:.0f}s L1 {l1:.4f} kl {float(kl.detach()):.2f} std {std:.3f} PSNR {quality:.1f}",
                flush=True,
            )
        if step % 500 == 0:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state_path, state | {"elapsed": clock.elapsed, "step": step})
    if team.rank == 0:
        held_out = Renders(args.held_out)
        held_out.images, held_out.labels = held_out.images[:60], held_out.labels[:60]
        finish(vae.eval(), held_out, output)


@torch.no_grad()
def finish(vae: Any, data: Renders, output: Path) -> None:
    """Round to fp16 (the stored form), set scale and shift from the statistics of the latents, measure, and save."""
    vae = vae.half().float().to(memory_format=torch.contiguous_format)
    x = pictures(data.images)
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(4)])
    vae.register_to_config(shift_factor=float(z.mean()), scaling_factor=float(1 / z.std()))

    def quality(x: Tensor) -> float:
        return psnr(torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(4)]), x)

    print(f"held-out PSNR: faces {quality(x):.1f}, palette {quality(palette_pictures(data.labels)):.1f}")
    print({c: round(quality(planes(data.labels, c)), 1) for c in (0, 1, 2, 4, 13)})
    print(f"latents: mean {float(z.mean()):.3f}, std {float(z.std()):.3f}, by channel {z.std((0, 2, 3)).tolist()}")
    vae.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo/train.npz"))
    parser.add_argument("--held-out", type=Path, default=Path("build/demo/held_out.npz"))
    parser.add_argument("--output", type=Path, default=Path("build/demo/vae"))
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    in_team(args.processes, train, args)


if __name__ == "__main__":
    main()
