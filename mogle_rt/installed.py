"""How this package was installed, so that a message can say how to add one of its extras in the same way."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from urllib.parse import unquote, urlparse

NAME = "mogle-rt"


def install_command(extra: str) -> str:
    """The command that installs an extra: from a package index, from a folder, or from where else the package came."""
    try:
        source = json.loads(importlib.metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        source = {"url": Path(__file__).parents[1].as_uri()}
    url = source.get("url", "")
    if url.startswith("file:"):
        editable = "-e " if source.get("dir_info", {}).get("editable") else ""
        return f"pip install {editable}'{unquote(urlparse(url).path)}[{extra}]'"
    if url:
        origin = f"{source['vcs_info']['vcs']}+{url}" if "vcs_info" in source else url
        return f"pip install '{NAME}[{extra}] @ {origin}'"
    return f"pip install '{NAME}[{extra}]'"
