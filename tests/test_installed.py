"""The command that errors give for installing an extra names the place where the package came from."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import mogle_rt
from mogle_rt.installed import install_command


@pytest.mark.parametrize(
    ("source", "command"),
    [
        (None, "pip install 'mogle-rt[export]'"),
        ({"url": "file:///a%20b/mogle", "dir_info": {"editable": True}}, "pip install -e '/a b/mogle[export]'"),
        ({"url": "file:///a/mogle.whl", "archive_info": {}}, "pip install '/a/mogle.whl[export]'"),
        (
            {"url": "https://host/mogle.git", "vcs_info": {"vcs": "git"}},
            "pip install 'mogle-rt[export] @ git+https://host/mogle.git'",
        ),
    ],
)
def test_an_extra_comes_from_where_the_package_came(
    source: dict[str, object] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = None if source is None else json.dumps(source)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
    assert install_command("export") == command


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert install_command("gguf") == f"pip install '{Path(mogle_rt.__file__).parents[1]}[gguf]'"
