"""The examples in docs/server.md work with a running server."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mogle_rt import Pipeline
from mogle_rt.bundle.shipped import write_examples
from tests.server.live import Live, live
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "server.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    with live([pipe]) as running:
        yield running


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("bash") is None, reason="needs curl and bash")
def test_curl_examples(served: Live, tmp_path: Path) -> None:
    side = served.studio.pipe.bundle.default_size
    write_examples(tmp_path / "masks")
    shown = [block.text for block in blocks(PAGE, "sh") if ADDRESS in block.text]
    assert len(shown) == 3
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "no_proxy": "*"}
    outputs = [
        subprocess.run(
            ["bash", "-e"],
            input=text.replace(ADDRESS, served.url),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for text in shown
    ]
    assert Image.open(tmp_path / "face.png").size == (side, side)
    assert json.loads((tmp_path / "edit.json").read_text())["size"] == f"{side}x{side}"
    told = [json.loads(line[6:]) for line in outputs[2].splitlines() if line.startswith("data: ")]
    assert told[-1]["type"] == "image_generation.completed"
    assert any(event["type"] == "image_generation.partial_image" for event in told)


def test_openai_example(served: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    side = served.studio.pipe.bundle.default_size
    write_examples(tmp_path / "masks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    (tmp_path / "face.png").write_bytes(base64.b64decode(served.draw(prompt="a man").json()["data"][0]["b64_json"]))
    shown = [block for block in blocks(PAGE, "python") if ADDRESS in block.text]
    assert len(shown) == 2
    for block in shown:
        exec(compile(block.text.replace(ADDRESS, served.url), block.place, "exec"), {"__name__": "__main__"})
    for number in range(2):
        assert Image.open(f"face-{number}.png").size == (side, side)
    assert Image.open("edited.png").size == Image.open("face.png").size
