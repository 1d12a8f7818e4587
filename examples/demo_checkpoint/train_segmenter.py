"""Makes, from renders, what measures the demo checkpoint's quality: a segmentation network and a table of colours.

    python -m examples.demo_checkpoint.train_segmenter --minutes 5

Pictures are blurred a little and get some noise, so that the network judges shapes and not how sharp a render is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file

from examples.demo_checkpoint.muon import Muon
from examples.demo_checkpoint.renders import Renders, pictures, resize
from examples.demo_checkpoint.training import Clock, learning_rate
from mogle_rt.quality.judges.colours import REGIONS, TABLE, region_colour
from mogle_rt.quality.judges.demo import SIDE, WEIGHTS, Segmenter

COLOUR_RENDERS = 3000  # of which the table of colours is made


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
        images, labels = resize(data.images[i], data.labels[i], SIDE, SIDE)
        x = pictures(images)
        if rng.random() < 0.5:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) * 0.6 + x * 0.4
        x = x * float(rng.uniform(0.9, 1.1)) + torch.randn_like(x) * float(rng.uniform(0, 0.06))
        loss = F.cross_entropy(model(x), torch.from_numpy(labels).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        done = clock.tick()
        if step % 100 == 0:
            print(f"{step} {clock.elapsed:.0f}s loss {float(loss.detach()):.4f}", flush=True)
    return model.eval()


def colour_table(data: Renders) -> dict[str, NDArray[Any]]:
    """The mean colours of regions at the judge's size, with the names that captions give them."""
    parts = [resize(data.images[i : i + 64], data.labels[i : i + 64], SIDE, SIDE) for i in range(0, len(data), 64)]
    images, masks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    table: dict[str, NDArray[Any]] = {}
    for attribute in REGIONS:
        found = [
            (colour, person[attribute])
            for image, labels, person in zip(images, masks, data.attributes, strict=True)
            if person[attribute] and (colour := region_colour(image, labels, attribute)) is not None
        ]
        table[f"{attribute}_colours"] = np.array([c for c, _ in found]).round().astype(np.uint8)
        table[f"{attribute}_names"] = np.array([n for _, n in found])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo/train"))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--output", type=Path, default=WEIGHTS.parent, help="the folder for both files")
    args = parser.parse_args()
    data = Renders(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    some = Renders(args.data, COLOUR_RENDERS)
    np.savez_compressed(args.output / TABLE.name, allow_pickle=False, **colour_table(some))
    torch.set_num_threads(1)
    model = train(data, args.minutes)
    save_file({n: t.half().contiguous() for n, t in model.state_dict().items()}, args.output / WEIGHTS.name)


if __name__ == "__main__":
    main()
