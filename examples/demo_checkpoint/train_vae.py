"""Trains the demo checkpoint's VAE on faces, palette masks and binary planes, which come from renders.

    python -m examples.demo_checkpoint.train_vae --data build/demo/train --output build/demo/vae --minutes 18

After an interruption it goes on from its last saved state.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from examples.demo_checkpoint.muon import Muon
from examples.demo_checkpoint.renders import Renders, palette_pictures, pictures, planes, psnr, resize
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
SIZES = (256, 192, 128)  # that the pictures of a batch have, of which it shows parts or all
CROPS_UNTIL = 0.7  # the part of the training that uses parts of pictures; after it come whole pictures
CROP = 96
KL_WEIGHT = 3e-4
COARSE_WEIGHT = 0.25  # of the error of pictures of half the size, see `loss_of`


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


def batch(data: Renders, count: int, size: int, crop: int, rng: np.random.Generator) -> Tensor:
    """Parts [count, 3, crop, crop] of pictures of some size: 6 faces for each palette mask and each plane.

    Half of the parts are near the middle of the face.
    """
    crops = []
    whole = data.images.shape[1]
    side = crop * whole // size
    for number, i in enumerate(rng.integers(0, len(data), count)):
        free = whole - side
        y, x = rng.integers(0, free + 1, 2) if number % 2 else rng.integers(free // 4, free - free // 4 + 1, 2)
        area = (slice(i, i + 1), slice(y, y + side), slice(x, x + side))
        image, labels = resize(data.images[area], data.labels[area], crop, crop)
        kind = rng.random()
        if kind < 0.75:
            part = pictures(image)
        elif kind < 0.875:
            part = palette_pictures(labels)
        else:
            part = planes(labels, int(rng.choice(np.unique(labels))))
        crops.append(part.flip(3) if rng.random() < 0.5 else part)
    return torch.cat(crops).contiguous(memory_format=torch.channels_last)


def loss_of(vae: Any, x: Tensor, coarse: bool) -> tuple[Tensor, Tensor, Any]:
    """The loss of pictures, their error, and the posterior.

    The error of edges keeps pictures sharp. With ``coarse`` the latents are also averaged over 2 x 2 cells, and the picture
    of half the size must come out of them: latents that behave so are easier for a diffusion model to learn, and alike at
    all sizes (Kouzelis et al. 2025, EQ-VAE).
    """
    posterior = vae.encode(x).latent_dist
    z = posterior.sample()
    error = vae.decode(z).sample - x
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss = _distance(error) + KL_WEIGHT * kl
    if coarse:
        small = vae.decode(F.avg_pool2d(z, 2)).sample - F.avg_pool2d(x, 2)
        loss = loss + COARSE_WEIGHT * _distance(small)
    return loss, error, posterior


def _distance(error: Tensor) -> Tensor:
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def train(team: Team, args: argparse.Namespace) -> None:
    """Train, or go on with a training. Process 0 finishes and saves the VAE."""
    data, output = Renders(args.data), args.output
    torch.manual_seed(0)
    vae = make_vae()
    scale = None
    if args.start:
        start = AutoencoderKL.from_pretrained(args.start).float()
        vae.load_state_dict(start.state_dict())
        if args.decoder_only:
            scale = start.config.shift_factor, start.config.scaling_factor
    parameters = list(vae.decoder.parameters() if args.decoder_only else vae.parameters())
    vae.encoder.requires_grad_(not args.decoder_only)
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
        size = SIZES[step % len(SIZES)]
        if done < CROPS_UNTIL:
            count, crop = 4, CROP
        else:
            count, crop = 2, min(size, 192)
        x = batch(data, max(1, count // team.size), size, crop, rng)
        loss, error, posterior = loss_of(vae, x, coarse=step % 2 == 0)
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
            print(f"{step} {clock.elapsed:.0f}s L1 {l1:.4f} std {std:.3f} PSNR {quality:.1f}", flush=True)
        if step % 200 == 0 or done >= 1:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state_path, state | {"elapsed": clock.elapsed, "step": step})
    if team.rank == 0:
        finish(vae.eval(), Renders(args.held_out, args.measured), output, scale)


@torch.no_grad()
def finish(vae: Any, data: Renders, output: Path, scale: tuple[float, float] | None) -> None:
    """Round to fp16 (the stored form), set shift and scale, measure, and save.

    Args:
        scale: shift and scale of the latents; None sets them by the latents' mean and deviation.
    """
    vae = vae.half().float().to(memory_format=torch.contiguous_format)
    z = torch.cat([vae.encode(x).latent_dist.mean for x in pictures(data.images).split(4)])
    shift, factor = scale or (float(z.mean()), float(1 / z.std()))
    vae.register_to_config(shift_factor=shift, scaling_factor=factor)
    print(f"latents: mean {float(z.mean()):.3f}, std {float(z.std()):.3f}, by channel {z.std((0, 2, 3)).tolist()}")

    def quality(x: Tensor) -> float:
        return psnr(torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(2)]), x)

    for size in SIZES:
        images, labels = resize(data.images, data.labels, size, size)
        shown = {c: round(quality(planes(labels, c)), 1) for c in (0, 1, 2, 4, 13)}
        faces, masks = quality(pictures(images)), quality(palette_pictures(labels))
        print(f"{size} px, held-out PSNR: faces {faces:.1f}, palette {masks:.1f}, planes {shown}", flush=True)
    vae.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo/train"))
    parser.add_argument("--held-out", type=Path, default=Path("build/demo/held_out"))
    parser.add_argument("--start", type=Path, help="a folder with the VAE to start from, see `export.unpack`")
    parser.add_argument("--measured", type=int, default=40, help="held-out renders that are measured at the end")
    parser.add_argument("--output", type=Path, default=Path("build/demo/vae"))
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder, and with it all latents")
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.decoder_only and not args.start:
        parser.error("--decoder-only needs --start")
    in_team(args.processes, train, args)


if __name__ == "__main__":
    main()
