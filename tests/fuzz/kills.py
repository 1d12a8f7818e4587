"""``python -m tests.fuzz.kills --kills 100 --seed 1``: commands that are killed at random moments, and then run again.

After a kill every file with a final name must be whole. The command must succeed when it is run again, and nothing of
the killed run may be left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SIGNALS = (*[signal.SIGKILL] * 6, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def _start(arguments: list[str]) -> int:
    """Run a command in a fork, in which all libraries are imported already."""
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        code = 1
        try:
            from mogle_rt.apps import cli

            sys.argv = ["mogle-rt", *arguments]
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(bool(error.code))
        finally:
            os._exit(code)
    return child


def _run(arguments: list[str]) -> tuple[int, float]:
    begin = time.perf_counter()
    _, status = os.waitpid(_start(arguments), 0)
    return status, time.perf_counter() - begin


def _whole(folder: Path) -> None:
    """Check that every file with a final name can be read to its end."""
    from PIL import Image

    from mogle_rt.bundle.bundle import Bundle
    from mogle_rt.engines.manifest import NAME, Manifest

    if (folder / NAME).exists():
        Manifest.read(folder).check_files(folder)  # finishes what was interrupted
    for path in folder.iterdir():
        if path.name.endswith(".part"):
            continue
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        if path.suffix == ".safetensors":
            Bundle(path).verify()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--command", action="append", help="one of the commands below; default: all")
    options = parser.parse_args()

    import torch

    from tests.checkpoints import write_checkpoint

    torch.set_num_threads(1)
    r, done, faults = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        files = write_checkpoint(root / "tiny", text_encoders=True)
        bundle, out = str(files.convert(root / "tiny.safetensors")), root / "out"
        sources = ["--flux", str(files.flux), "--lora", str(files.lora), "--mogle", str(files.mogle)]
        small = ["--steps", "2", "--height", "32", "--width", "32", "--seed", "1", "--dtype", "fp32", "--device", "cpu"]
        exporting = ["export", bundle, "-o", str(out), "--no-verify"]
        _run(["examples", "-o", str(root / "masks")])
        older: Callable[[], object] = lambda: _run([*exporting, "--dtype", "fp16", "--weights", "copy"])  # noqa: E731
        commands: dict[str, tuple[list[str], Callable[[], object]]] = {
            "convert": (["convert", *sources, "-o", str(out / "b.safetensors"), "--overwrite"], lambda: None),
            "quantize": (
                ["quantize", bundle, "-o", str(out / "q.safetensors"), "--weights", "int8", "--overwrite"],
                lambda: None,
            ),
            "generate": (["generate", bundle, "-o", str(out / "face.png"), "--overwrite", *small], lambda: None),
            "a folder of masks": (
                ["generate", bundle, "-m", str(root / "masks"), "-o", str(out), "--skip-existing", *small],
                lambda: None,
            ),
            "batch": (
                ["batch", bundle, str(root / "masks"), "-o", str(out), "--num-workers", "1", *small],
                lambda: None,
            ),
            "export": ([*exporting, "--dtype", "fp32", "--weights", "copy"], lambda: None),
            "export over an older one": ([*exporting, "--dtype", "fp32", "--weights", "link"], older),
        }
        commands = {name: what for name, what in commands.items() if options.command is None or name in options.command}
        times = {}
        for name, (arguments, before) in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            before()
            status, times[name] = _run(arguments)
            assert not status, f"{name} fails: {status}"
        for number in range(options.kills):
            name = list(commands)[number % len(commands)]
            arguments, before = commands[name]
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            before()
            child = _start(arguments)
            time.sleep(r.uniform(0, 1.1 * times[name]))
            with_signal = r.choice(SIGNALS)
            os.kill(child, with_signal)  # the number stays the child's, even when it has ended, until we wait for it
            os.waitpid(child, 0)
            what = ""
            try:
                _whole(out)
            except Exception as error:
                what = f"not whole: {error}"
            status, _ = _run(arguments)
            left = [p.name for p in out.iterdir() if p.name.endswith(".part")]
            if status:
                what = what or f"the rerun ends in {status}"
            if left:
                what = what or f"left over: {left}"
            done[name] += 1
            print(f"\r{number + 1} of {options.kills}", end="", file=sys.stderr, flush=True)
            if what:
                faults += 1
                print(f"{name}, kill {number} by {with_signal.name}: {what}", flush=True)
    print(f"seed {options.seed}: {sum(done.values())} kills, {faults} faults: {dict(done)}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
