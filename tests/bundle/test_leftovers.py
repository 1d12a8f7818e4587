"""A process that is killed leaves nothing half-done: the next one removes what it left, or finishes it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mogle_rt import OutputError
from mogle_rt.bundle.files import atomic_write, replace_together
from mogle_rt.bundle.leftovers import GONE, sweep

pytestmark = [pytest.mark.quick, pytest.mark.skipif(os.name == "nt", reason="no signals, no locks")]


def dies(work: Callable[[], None]) -> bool:
    """Do the work in a fork. Returns whether the work killed it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write(path: Path, text: bytes) -> None:
    with atomic_write(path) as file:
        file.write(text)


def test_a_killed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def work() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            kill()

    assert dies(work)
    assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"old"
    code = f"from mogle_rt.bundle.files import atomic_write\nwith atomic_write({str(tmp_path / 'b.bin')!r}) as f: pass"
    code = code.replace("atomic_write(", "atomic_write(__import__('pathlib').Path(").replace(") as f", ")) as f")
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "b.bin"]


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.bin") as file, replace_together(tmp_path, last="m") as new:
        file.write(b"a")
        (new / "m").write_bytes(b"m")
        sweep(tmp_path)
        assert not dies(lambda: sweep(tmp_path))
        assert len(list(tmp_path.iterdir())) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "m"]


def test_what_others_named_is_left_alone(tmp_path: Path) -> None:
    """Other programs' unfinished files end in .part too, such as browsers' downloads."""
    for name in ("a.part", ".a.part", "movie.mkv.part", ".0123456789abcdef.part.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".0123456789abcdef.part").symlink_to(tmp_path / "a.part")
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


OLD, NEW = {"a": b"1", "c": b"1", "m": b"1", "w": b"1"}, {"a": b"2", "b": b"2", "m": b"2"}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def replacement(folder: Path) -> None:
    with replace_together(folder, last="m") as new:
        for name, data in NEW.items():
            (new / name).write_bytes(data)
        (new / GONE).mkdir()
        (new / GONE / "w").touch()


def test_a_replacement_killed_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before the new files are complete undoes the replacement; after that, the next process finishes it.

    The same holds if the next process is killed as well.
    """
    outcomes = []
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        for name, data in OLD.items():
            (folder / name).write_bytes(data)
        left = moment

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def run(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if not left:
                    kill()
                return call(*args, **kwargs)

            return run

        with monkeypatch.context() as m:
            for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (os, "link"), (os, "fsync")):
                m.setattr(owner, name, counted(getattr(owner, name)))
            if not dies(partial(replacement, folder)):
                break
            left = 2
            dies(partial(sweep, folder))
        sweep(folder)
        outcomes.append(contents(folder))
    else:
        pytest.fail("never came to its end")
    new = {"c": b"1", **NEW}
    assert all(found in (OLD, new) for found in outcomes)
    assert outcomes[0] == OLD
    assert outcomes[-1] == new
    assert len(outcomes) > 8


def test_a_replacement_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in OLD.items():
        (tmp_path / name).write_bytes(data)
    real = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.name == "m" and self.parent != tmp_path and self.parent.name != "old":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"m: can't be written: No space left"):
        replacement(tmp_path)
    assert contents(tmp_path) == OLD


@pytest.mark.parametrize("links", [True, False])
def test_modes_stay(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private file that is replaced stays private, also while the new one is written."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    for name in ("a", "m"):
        (tmp_path / name).write_bytes(b"1")
        (tmp_path / name).chmod(0o600)
    with atomic_write(tmp_path / "a") as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
    with replace_together(tmp_path, last="m") as new:
        (new / "m").write_bytes(b"2")
    for name in ("a", "m"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    write(tmp_path / "b", b"")
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) != 0o600


@pytest.mark.parametrize(
    ("number", "ignored"), [(signal.SIGHUP, False), (signal.SIGHUP, True), (signal.SIGTERM, False)]
)
def test_signals_end_a_program_cleanly(number: signal.Signals, ignored: bool, tmp_path: Path) -> None:
    """A terminal sends SIGHUP when it is closed. nohup has a program ignore it, and then it must stay ignored."""
    code = f"""
import signal, time, typer
from pathlib import Path
from mogle_rt.apps.program import run_app
from mogle_rt.bundle.files import atomic_write
app = typer.Typer()
@app.command()
def main():
    with atomic_write(Path({str(tmp_path / "a")!r})) as file:
        print("ready", flush=True)
        time.sleep({1 if ignored else 60})
{"signal.signal(signal.SIGHUP, signal.SIG_IGN)" if ignored else "signal.signal(signal.SIGHUP, signal.SIG_DFL)"}
run_app(app)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        time.sleep(0)
        process.wait(30)
    assert process.returncode == (0 if ignored else 128 + number)
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if ignored else [])
