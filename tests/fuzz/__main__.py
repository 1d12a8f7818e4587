"""``python -m tests.fuzz --seed 1``: many attempts to break each reader, and a table of how they ended."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ATTEMPTS = {
    "bundle, run": 0.1,
    "graph": 0.1,
    "FLUX folder": 0.5,
    "MoGLE": 0.8,
    "table of rows": 0.3,
    "evaluated folder": 0.3,
}  # slow readers get this share of tries


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--attempts", type=int, default=1000, help="at each reader; slow ones get a part of it")
    parser.add_argument("--reader", action="append", help="a reader's name; default: all")
    parser.add_argument("--first", type=int, default=0, help="number of the first attempt")
    options = parser.parse_args()

    import torch

    from tests.checkpoints import Files, write_checkpoint
    from tests.fuzz.attempts import REFUSED, WORKS, attempt_many
    from tests.fuzz.readers import readers

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        files = write_checkpoint(Path(folder) / "tiny", text_encoders=True)
        assert isinstance(files, Files)
        bundle = files.convert(Path(folder) / "tiny.safetensors")
        every = readers(files, bundle, Path(folder) / "spoiled")
        print(f"seed {options.seed}\n\n| reader | attempts | works | refused in one line | defects | longest |")
        print("|---|--:|--:|--:|--:|--:|")
        for name, attempt in every.items():
            if options.reader and name not in options.reader:
                continue
            count = round(options.attempts * ATTEMPTS.get(name, 1.0))
            report = attempt_many(name, attempt, options.seed, range(options.first, options.first + count))
            found += len(report.defects)
            print(
                f"| {name} | {sum(report.outcomes.values()):,} | {report.outcomes[WORKS]:,} | "
                f"{report.outcomes[REFUSED]:,} | {len(report.defects)} | {report.longest:.1f} s |",
                flush=True,
            )
            for number, defect in report.defects:
                print(f"    {name} {number}: {defect}", file=sys.stderr, flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
