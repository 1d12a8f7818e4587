"""Train the segmentation network that measures the demo checkpoint's quality, on renders.

    python -m examples.demo_checkpoint.train_segmenter --minutes 5

Pictures are blurred and made noisy a little, so that the network judges shapes, not a renderer's crispness.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from benchmarks.segmenter import WEIGHTS, Segmenter
from examples.demo_checkpoint.muon import Muon
from examples.demo_checkpoint.renders import Renders, pictures
from examples.demo_checkpoint.training import Clock, learning_rate


def train(data: Renders, minutes: float) -> Segmenter:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Segmenter()
    optimizer = Muon(model.parameters(), lr=5e-3)
    clock, step, done = Clock(minutes * 60), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * learning_rate(done, step, warm_up=20, constant=0.2)
        i = rng.integers(0, len(data), 4)
        x = pictures(data.images[i])
        if rng.random() < 0.5:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) * 0.6 + x * 0.4
        x = x * float(rng.uniform(0.9, 1.1)) + torch.randn_like(x) * float(rng.uniform(0, 0.06))
        loss = F.cross_entropy(model(x), torch.from_numpy(data.labels[i]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        done = clock.tick()
        if step % 100 == 0:
            print(f"{step} {clock.elapsed:.0f}s loss {float(loss.detach()):.4f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo/train.npz"))
    parser.add_argument("--minutes", type=float, default=5)
    args = parser.parse_args()
    model = train(Renders(args.data), args.minutes)
    save_file({n: t.half().contiguous() for n, t in model.state_dict().items()}, WEIGHTS)


if __name__ == "__main__":
    main()
