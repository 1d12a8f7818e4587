"""Ray's surroundings: where it isn't installed, what is set for it, what it leaves, and what of its messages is seen."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mogle_rt.batch import session
from mogle_rt.errors import ClusterError, ConfigError

pytestmark = pytest.mark.quick


def test_without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mogle_rt.batch import run

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else "there")
    with pytest.raises(ConfigError, match=r"^batch needs ray: pip install .*\[batch\]'$"):
        run("demo", tmp_path, tmp_path / "out")


def test_importing_is_light() -> None:
    code = (
        "import sys, mogle_rt.batch, mogle_rt.apps.cli; print(sorted({'ray', 'pyarrow', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_ray_reports_nothing_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with session._environment(session.QUIET):
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        os.environ["RAY_SET_BY_ITSELF"] = "1"
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ
    assert "RAY_SET_BY_ITSELF" not in os.environ
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with session._environment(session.QUIET):
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if len(str(tmp_path)) > session.LONGEST_FOLDER:
        monkeypatch.setattr(session, "LONGEST_FOLDER", 200)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"{session.PREFIX}left"
    left.mkdir()
    (left / session.LOCK).touch()
    other = tmp_path / "of-somebody-else"
    other.mkdir()
    with session._temporary_folder() as first:
        assert not left.exists()
        with session._temporary_folder() as second:  # as another process that begins meanwhile
            assert first.parent == second.parent == tmp_path
            assert first.exists()
        assert not second.exists()
    assert list(tmp_path.iterdir()) == [other]


NOISE = """
import os, sys, threading
from mogle_rt.batch.quiet import without_rays_messages
with without_rays_messages():
    os.write(2, b"[2026-11-30 23:19:29,302 E 23432 23432] core_worker.cc:2465: Actor with class name\\n")
    os.write(2, b"of another library\\n")
    print("of python", file=sys.stderr)
    thread = threading.Thread(target=lambda: print("(raylet) Task failed."), name="ray_listen_error_messages")
    thread.start(); thread.join()
    print("result")
os.write(2, b"afterwards\\n")
print("end", file=sys.stderr)
"""


def test_rays_messages_stay_away_and_others_pass() -> None:
    done = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
    assert sorted(done.stderr.splitlines()) == ["afterwards", "end", "of another library", "of python"]


def test_no_cluster_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray, of the extra batch")

    def refused(**_: object) -> None:
        raise ConnectionError("a trace\nof many lines\nray.init failed: no GCS there")

    monkeypatch.setattr(ray, "init", refused)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    message = "Ray can't reach a cluster at 10.0.0.1:6379: ConnectionError: ray.init failed: no GCS there"
    with pytest.raises(ClusterError, match=f"^{message}$"), session.ray_session("10.0.0.1:6379", 1):
        pytest.fail("no cluster")
