"""Which images are planned: masks by folder and pattern, prompts as people keep them, names of files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mogle_rt.apps import drawings
from mogle_rt.apps.drawings import Drawing, find_masks, plan, say_how_many_have_prompts
from mogle_rt.errors import InputError, OutputError


def names(masks: list[Path | None], output: Path | str, count: int = 1, suffix: str | None = None) -> list[str]:
    planned = plan(masks, ["a face"], count, 7, Path(output), "refuse", suffix)
    return [drawing.path.as_posix() for drawing in planned]


def mm_celeba_hq(folder: Path, count: int, texts: str) -> list[Path]:
    """An empty data set in the layout of MM-CelebA-HQ, with captions in "text.json" or in the folder "text"."""
    (folder / "mask").mkdir(parents=True)
    (folder / "text").mkdir()
    for i in range(count):
        (folder / "mask" / f"{i}.png").write_bytes(b"")
        if texts == "text":
            (folder / "text" / f"{i}.txt").write_text(f"face {i}\nanother caption\n")
    if texts == "text.json":
        captions = {f"{i}.jpg": [f" face {i} ", "another caption"] for i in range(count)}
        (folder / "text.json").write_text(json.dumps(captions))
    return sorted((folder / "mask").iterdir(), key=lambda path: int(path.stem))


@pytest.mark.parametrize("texts", ["text", "text.json"])
def test_prompts_of_mm_celeba_hq(texts: str, tmp_path: Path) -> None:
    masks = mm_celeba_hq(tmp_path / "set", 3, texts)
    planned = plan([*masks], None, 1, 0, tmp_path / "out", "refuse")
    assert [drawing.prompt for drawing in planned] == ["face 0", "face 1", "face 2"]
    masks[1].with_suffix(".txt").write_text("one of my own")  # what lies beside the mask comes first
    planned = plan([*masks], None, 1, 0, tmp_path / "out", "refuse")
    assert [drawing.prompt for drawing in planned] == ["face 0", "one of my own", "face 2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold a JSON object"),
        ("{", "not readable as JSON"),
        ('{"0.jpg": 3}', "'0' must be a text or a list"),
    ],
)
def test_captions_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    (mask,) = mm_celeba_hq(tmp_path, 1, "none")
    (tmp_path / "text.json").write_text(content)
    with pytest.raises(InputError, match=message):
        plan([mask], None, 1, 0, tmp_path / "out", "refuse")


def test_one_of_ten_captions_is_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a file beside the mask: ten lines are ten captions of one face, not one long prompt."""
    for name, text in (("a", "\n".join(f" caption {i} \n" for i in range(1, 11))), ("b", "only one\n"), ("c", None)):
        (tmp_path / f"{name}.png").write_bytes(b"")
        if text:
            (tmp_path / f"{name}.txt").write_text(text)

    def prompts(names: str, caption: int) -> tuple[list[str], str]:
        out = io.StringIO()
        monkeypatch.setattr(drawings, "console", Console(file=out, width=1000))
        masks: list[Path | None] = [tmp_path / f"{name}.png" for name in names]
        planned = plan(masks, None, 1, 0, tmp_path / "out", "refuse", caption=caption)
        return [drawing.prompt for drawing in planned], out.getvalue()

    texts, said = prompts("aabc", 1)
    assert texts == ["caption 1", "caption 1", "only one", ""]
    assert said == "masks have up to 10 captions; number 1 is the prompt, --caption N chooses another\n"
    assert prompts("ac", 10)[0] == ["caption 10", ""]
    assert prompts("b", 1) == (["only one"], "")
    with pytest.raises(InputError, match=r"--caption 11: .*a\.png has 10 captions; give a number from 1 to 10"):
        prompts("a", 11)
    with pytest.raises(InputError, match=r"b\.png has 1 caption;"):
        prompts("ab", 2)


def test_masks_without_prompts_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(prompts: list[str]) -> str:
        out = io.StringIO()
        monkeypatch.setattr(drawings, "console", Console(file=out, width=1000))
        say_how_many_have_prompts([Drawing(Path(f"{i}.png"), text, 0, Path()) for i, text in enumerate(prompts)])
        return out.getvalue()

    assert told([""] * 1000).startswith("0 of 1,000 masks have a prompt; the others are drawn from the mask alone")
    assert told(["a face", "", "b"]).startswith("2 of 3 masks have a prompt")
    assert told(["a face", "b"]) == ""


def test_masks_by_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "a.txt", ".hidden.png", "[1].png"):
        (tmp_path / name).write_text("")
    assert list(find_masks([Path("?.png"), Path("[1].png")])) == [Path("a.png"), Path("b.png"), Path("[1].png")]
    assert list(find_masks([tmp_path / "a*"])) == [tmp_path / "a.png"]
    with pytest.raises(InputError, match=r"c\*\.png: no mask fits this pattern"):
        list(find_masks([Path("c*.png")]))


def test_names_by_pattern(tmp_path: Path) -> None:
    two: list[Path | None] = [Path("m/ann.png"), Path("m/bob.png")]
    folder = tmp_path.as_posix()
    assert names(two, f"{folder}/{{stem}}/{{seed}}.jpg") == [f"{folder}/ann/7.jpg", f"{folder}/bob/8.jpg"]
    assert names(two, f"{folder}/{{number}}", suffix="jpg") == [f"{folder}/1.jpg", f"{folder}/2.jpg"]
    assert names(two, tmp_path, suffix="jpg") == [f"{folder}/ann_7.jpg", f"{folder}/bob_8.jpg"]
    assert names([None], f"{folder}/{{stem}}_{{seed}}", 2) == [f"{folder}/face_7.png", f"{folder}/face_8.png"]
    for output, suffix, message in (
        ("{stem}.png", None, r"names two images .*ann\.png; put \{seed\} or \{number\} into the pattern"),
        ("{name}.png", None, r"a pattern may hold \{stem\}, \{seed\}, \{number\}; unknown \{name\}"),
        ("{seed!r}.png", None, "a pattern may hold"),
        ("{.png", None, "a pattern may hold"),
        ("{seed}.gif", None, "images are written as"),
        ("{seed}.png", "jpg", "--format jpg contradicts the name's .png"),
        ("{seed}", "gif", "--format must be png or jpg, got 'gif'"),
    ):
        with pytest.raises(OutputError, match=message):
            names([Path("ann.png")], tmp_path / output, 2, suffix)
    assert names([None], tmp_path / "x.jpeg", suffix="jpg") == [f"{folder}/x.jpeg"]
