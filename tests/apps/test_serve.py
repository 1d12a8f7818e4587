"""The command `serve`: what it refuses before it loads large libraries, and a run of the real program."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mogle_rt.apps import serve_command
from tests.apps.test_cli import run
from tests.apps.test_start import probe


def test_wrong_options_are_told_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    short, empty = tmp_path / "short", tmp_path / "empty"
    short.write_text("abc\n")
    empty.write_text("# nothing\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        commands: tuple[tuple[object, ...], ...] = (
            ("serve", "demo", "--host", "0.0.0.0"),
            ("serve", "demo", "--api-key-file", tmp_path / "absent"),
            ("serve", "demo", "--api-key-file", short),
            ("serve", "demo", "--api-key-file", empty),
            ("serve", "demo", "--port", taken.getsockname()[1]),
            ("serve", "demo", "--queue", 0),
            ("serve", "demo", "--dtype", "int8"),
            ("serve", tmp_path / "absent.safetensors", "--port", 0),
        )
        assert probe(*commands) == ["[] 1"] * len(commands)


def test_other_machines_need_a_key() -> None:
    result = run("serve", "demo", "--host", "0.0.0.0", "--port", 0)
    assert result.code == 1
    assert "--api-key-file" in result.err


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_command, "NEEDED", ("fastapi", "a_package_that_nobody_has"))
    result = run("serve", "demo")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "a_package_that_nobody_has" in result.err
    assert "mogle-rt[serve]" in result.err


def test_nothing_else_needs_the_extra() -> None:
    """Without the server's packages, the package and its other commands can be imported."""
    hidden = (
        "for name in ('fastapi', 'starlette', 'uvicorn', 'prometheus_client', 'pydantic'): sys.modules[name] = None"
    )
    code = (
        f"import sys\n{hidden}\nimport mogle_rt.pipeline, mogle_rt.apps.cli, mogle_rt.apps.drawing\nprint('imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "imported"


def test_the_program_answers_and_stops(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the test\na-key-of-sixteen-characters\n")
    command = [sys.executable, "-m", "mogle_rt", "serve", "demo", "--port", "0", "--api-key-file", str(keys)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
        assert found
        body = {"prompt": "a woman, turquoise", "size": "64x64", "num_inference_steps": 1}
        with httpx.Client(base_url=found[0], timeout=120, trust_env=False) as client:
            assert client.post("/v1/images/generations", json=body).status_code == 401
            client.headers["Authorization"] = "Bearer a-key-of-sixteen-characters"
            answer = client.post("/v1/images/generations", json=body)
            assert answer.status_code == 200
        assert any("never saw 'turquoise' in" in warning for warning in answer.json()["warnings"])
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert "POST /v1/images/generations 200" in log
    assert "Traceback" not in log
    assert "a woman" not in log
    assert "turquoise" not in log
