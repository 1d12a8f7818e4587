"""`make gpu`, as far as it can be tested without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu_report import Stage, missing, report, run_stage

ROOT = Path(gpu_report.__file__).parents[1]
TESTS = """
import time
import pytest

pytestmark = pytest.mark.gpu

def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no")
def test_skipped(): pass
def test_slow(): time.sleep(SLEEP)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_that_there_is_no_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.md"
    assert gpu_report.main(["--report", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("no CUDA device: PyTorch ")
    assert said.err.count("\n") == 1
    assert not path.exists()


@pytest.mark.quick
def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert missing(("torch", "no_such_module")) == ["no_such_module"]
    monkeypatch.setattr(gpu_report, "NEEDED", ("torch", "no_such_module"))
    assert gpu_report.main([]) == 2
    assert capsys.readouterr().err.startswith("make gpu needs no_such_module;")


@pytest.mark.parametrize(("sleep", "passed"), [(0, 2), (600, 1)], ids=["whole", "interrupted"])
def test_a_stage_counts_what_ran_in_its_time(sleep: int, passed: int, tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(TESTS.replace("SLEEP", str(sleep)))
    for seconds in (5, 60):  # 60 where this machine is too busy to start pytest within 5
        stage = run_stage("some", (str(tests),), seconds)
        if stage.counts["failed"] and (sleep or not stage.note):
            break
    assert (stage.counts["passed"], stage.counts["failed"], stage.counts["skipped"]) == (passed, 1, 1)
    assert stage.note == (f"stopped after {seconds} s" if sleep else "")
    assert len(stage.failures) == 1
    assert "test_bad" in stage.failures[0]
    assert "one is not two" in stage.failures[0]
    text = report(
        "a card", [stage, Stage("others", note="no time left")], ["| gate | bfloat16 | 1 | 1 | 100% | 2 |"], ["a note"]
    )
    assert f"| some | {passed} | 1 | 0 | 1 |" in text
    assert "| others | 0 | 0 | 0 | 0 | 0 | no time left |" in text
    for part in ("- card: a card", "- a note", f"- torch {torch.__version__}\n", "one is not two", "| gate |"):
        assert part in text


def test_kernels_tests_need_few_packages() -> None:
    """Where the packages for whole images are missing, pytest can still collect the first stage's tests."""
    blocked = ["diffusers", "transformers", "tokenizers", "PIL", "onnx", "onnxruntime", "scipy", "peft"]
    code = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels/test_gpu.py"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_equals_its_twin" in done.stdout
