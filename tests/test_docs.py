"""The README and the pages in docs/ stay true: links lead somewhere, commands exist, snippets run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from mogle_rt.apps.cli import app
from mogle_rt.bundle.shipped import write_examples
from mogle_rt.export.__main__ import app as export_app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted((ROOT / "benchmarks").glob("*.md")), ROOT / "examples" / "demo_checkpoint" / "README.md"]
MOST_LINES = 150  # of the README, which a newcomer reads whole
EXPORTS = "mogle_rt.export.exporter"  # a snippet that exports is long, and tests/export runs the same


@dataclass(frozen=True)
class Block:
    """A fenced block of code: its language and text, and its page and line, which a failure shows."""

    language: str
    text: str
    place: str

    def __str__(self) -> str:
        return self.place


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of a page that are in this language."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], f"{name_of(page)}:{text.count(chr(10), 0, found.start()) + 1}")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if found[1] == language
    ]


SNIPPETS = [block for page in PAGES for block in blocks(page, "python")]
SCRIPTS = [block for page in PAGES for block in blocks(page, "sh")]


def without_code(text: str) -> str:
    """A page's text without fenced blocks, in which # is no heading and [x](y) no link."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead, web addresses aside."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    return [target for target in targets if "://" not in target]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.quick
@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside of the repository"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_linked_from_the_readme_and_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    pages = {page.name for page in PAGES} - {"README.md"}
    assert pages
    assert pages <= {Path(link).name for link in links(index)}
    assert pages <= {Path(link).name for link in links(README) if link.startswith("docs/")}


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, one a line, without comments and with continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def parse(words: list[str]) -> None:
    """Parse a command line as the program would, without running it.

    Where a sentence names only a command, as `mogle-rt convert`, that command must exist, and no options are needed.

    Raises:
        AssertionError: there is no such command.
        click's UsageError (whatever module typer has it from): no such option, or a value that is refused.
    """
    program: Any = get_command(app)
    if words[0] == "mogle-rt":
        name, *arguments = words[1:]
        assert name in program.commands, f"mogle-rt has no command {name}"
        program = program.commands[name]
    else:
        name, program, arguments = "mogle_rt.export", get_command(export_app), words[3:]
    if arguments not in ([], ["--help"]):
        program.make_context(name, arguments)


PROGRAMS = (["mogle-rt"], ["python", "-m", "mogle_rt.export"])


def shown_commands() -> list[tuple[str, list[str]]]:
    """Every call of our programs on any page, with its place: in shell blocks, and those within a sentence."""
    found = [(block.place, words) for block in SCRIPTS for words in commands(block.text)]
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", without_code(page.read_text(encoding="utf-8"))):
            if code.startswith(("mogle-rt ", "python -m mogle_rt.export ")) and "…" not in code:
                found.append((name_of(page), shlex.split(code)))
    return [(place, words) for place, words in found if any(words[: len(p)] == p for p in PROGRAMS)]


def test_commands_exist() -> None:
    shown = shown_commands()
    assert {words[1] for _, words in shown if words[0] == "mogle-rt"} >= {"convert", "generate", "info", "cost"}
    for place, words in shown:
        try:
            parse(words)
        except Exception as error:
            pytest.fail(f"{place}: {' '.join(words)}: {error}")


@pytest.mark.parametrize("line", ["mogle-rt draw demo", "mogle-rt info demo --colour", "mogle-rt cost --batch many"])
def test_a_wrong_command_is_seen(line: str) -> None:
    with pytest.raises(Exception, match=r"draw|colour|integer"):
        parse(line.split())


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.compile(r"(?:`|^)make ([a-z]+)(?=`| *$| *#)", re.MULTILINE)
    shown = {name for page in PAGES for name in named.findall(page.read_text(encoding="utf-8"))}
    assert "test" in shown
    assert shown <= targets


@pytest.mark.parametrize("block", SNIPPETS, ids=str)
def test_snippets_compile(block: Block) -> None:
    compile(block.text, block.place, "exec")


def runs_with_the_demo(block: Block) -> bool:
    """Whether a snippet needs no checkpoint but the one in the package."""
    return '"demo"' in block.text and 'Pipeline("ckpt' not in block.text and EXPORTS not in block.text


def test_most_snippets_are_run() -> None:
    assert sum(map(runs_with_the_demo, SNIPPETS)) >= 0.7 * len(SNIPPETS)


RUN = {block.text: block for block in SNIPPETS if runs_with_the_demo(block)}  # each text once, on however many pages


@pytest.mark.parametrize("block", RUN.values(), ids=str)
def test_snippets_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(tmp_path / "masks")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, int(os.environ.get("OMP_NUM_THREADS", "1"))))  # the demo is a small model
    try:
        exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(threads)
