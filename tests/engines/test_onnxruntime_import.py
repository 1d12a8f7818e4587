"""Importing onnxruntime leaves no file in the user's folders and opens no connection."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mogle_rt
from mogle_rt.engines.onnxruntime_import import SWITCH, import_onnxruntime

ROOT = Path(mogle_rt.__file__).parents[1]

# Makes and runs a session. Meanwhile Python can open no socket, and a thread looks for sockets that the library opens.
SESSION = """
import os, pathlib, socket, threading, time

def refuse(*_, **__):
    raise AssertionError("a socket was opened")

socket.socket.connect = socket.getaddrinfo = refuse
found, done = set(), threading.Event()

def watch():
    folder = pathlib.Path("/proc/self/fd")
    while folder.is_dir() and not done.wait(0.001):
        for handle in os.listdir(folder):
            try:
                target = os.readlink(folder / handle)
            except OSError:
                continue
            if target.startswith("socket:"):
                found.add(target)

watcher = threading.Thread(target=watch)
watcher.start()
from mogle_rt.engines.onnxruntime_import import import_onnxruntime
onnxruntime = import_onnxruntime()
from onnx import TensorProto, helper
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab"]
graph = helper.make_graph([helper.make_node("Neg", ["a"], ["b"])], "g", values[:1], values[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
import numpy
assert session.run(None, {"a": numpy.ones(1, "float32")})[0] == -1
time.sleep(1)  # what is sent is sent by a thread
done.set()
watcher.join()
assert not found, f"sockets were opened: {found}"
"""


def imports_onnxruntime(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.partition(".")[0] == "onnxruntime" for name in names):
            return True
    return False


def test_it_is_imported_in_one_place() -> None:
    folders = ("mogle_rt", "export", "kernels", "benchmarks", "tests", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    importing = {path.relative_to(ROOT).as_posix() for path in files if imports_onnxruntime(path)}
    assert importing == {"mogle_rt/engines/onnxruntime_import.py"}


def test_it_leaves_no_file_and_opens_no_connection(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    home = tmp_path / "home"
    home.mkdir()
    places = (
        "HOME",
        "USERPROFILE",
        "LOCALAPPDATA",
        "APPDATA",
        "TMPDIR",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
    )
    environment = os.environ | dict.fromkeys(places, str(home)) | {"PYTHONPATH": str(ROOT)}
    environment.pop(SWITCH, None)
    done = subprocess.run([sys.executable, "-c", SESSION], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.quick
def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    import_onnxruntime()
    assert os.environ[SWITCH] == "0"
    monkeypatch.delenv(SWITCH)
    import_onnxruntime()
    assert os.environ[SWITCH] == "1"
