"""Which images are planned: masks from folders and patterns, prompts from the places where people keep them, and the
names of the images' files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mogle_rt.errors import InputError, OutputError
from mogle_rt.jobs.captions import captions_of, prompts_of
from mogle_rt.jobs.naming import Naming
from mogle_rt.jobs.plan import Drawing, count_prompts, find_masks, plan, shard

pytestmark = pytest.mark.quick


def names(masks: list[Path | None], output: Path | str, count: int = 1, suffix: str | None = None) -> list[str]:
    naming = Naming(Path(output), suffix, masks=len(masks), several_images=count > 1)
    planned = plan(masks, ["a face"] * len(masks), count, 7, naming)
    return [drawing.path.as_posix() for drawing in planned]


def prompts(masks: list[Path], caption: int = 1) -> tuple[list[str], list[str]]:
    """The prompts that are found for these masks, and the messages that this gives."""
    said: list[str] = []
    return prompts_of(None, [*masks], caption, said.append), said


def mm_celeba_hq(folder: Path, count: int, texts: str) -> list[Path]:
    """A data set of empty files in MM-CelebA-HQ's layout, with captions in "text.json" or in the folder "text"."""
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
    assert prompts(masks)[0] == ["face 0", "face 1", "face 2"]
    masks[1].with_suffix(".txt").write_text("one of my own")  # what lies beside the mask comes first
    assert prompts(masks)[0] == ["face 0", "one of my own", "face 2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold a JSON object"),
        ("{", "not readable as JSON"),
        ('{"0.jpg": 3}', "'0' must be a text or a list"),
    ],
)
def test_bad_captions(content: str, message: str, tmp_path: Path) -> None:
    (mask,) = mm_celeba_hq(tmp_path, 1, "none")
    (tmp_path / "text.json").write_text(content)
    with pytest.raises(InputError, match=message):
        prompts([mask])


def test_one_of_ten_captions_is_the_prompt(tmp_path: Path) -> None:
    """In a file beside the mask too, ten lines are ten captions of one face, not one long prompt."""
    for name, text in (("a", "\n".join(f" caption {i} \n" for i in range(1, 11))), ("b", "only one\n"), ("c", None)):
        (tmp_path / f"{name}.png").write_bytes(b"")
        if text:
            (tmp_path / f"{name}.txt").write_text(text)

    def of(names: str, caption: int = 1) -> tuple[list[str], list[str]]:
        return prompts([tmp_path / f"{name}.png" for name in names], caption)

    texts, said = of("aabc")
    assert texts == ["caption 1", "caption 1", "only one", ""]
    assert said == ["masks have up to 10 captions; number 1 is the prompt, --caption N chooses another"]
    assert of("ac", 10)[0] == ["caption 10", ""]
    assert of("b") == (["only one"], [])
    with pytest.raises(InputError, match=r"--caption 11: .*a\.png has 10 captions; give a number from 1 to 10"):
        of("a", 11)
    with pytest.raises(InputError, match=r"b\.png has 1 caption;"):
        of("ab", 2)


def test_masks_without_prompts_are_told() -> None:
    def told(prompts: list[str]) -> str | None:
        return count_prompts([Drawing(Path(f"{i}.png"), text, 0, Path()) for i, text in enumerate(prompts)])

    assert (told([""] * 1000) or "").startswith(
        "0 of 1,000 masks have a prompt; the others are drawn from the mask alone"
    )
    assert (told(["a face", "", "b"]) or "").startswith("2 of 3 masks have a prompt")
    assert told(["a face", "b"]) is None


def test_shards_are_all_images_once() -> None:
    drawings = [Drawing(None, "", seed, Path(str(seed))) for seed in range(10)]
    parts = [shard(drawings, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(drawing.seed for part in parts for drawing in part) == list(range(10))
    assert [len(part) for part in parts] == [4, 3, 3]
    assert shard(drawings, None) == drawings
    for wrong in ("0/2", "3/2", "1", "1/", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(InputError, match=r"--shard must be I/N"):
            shard(drawings, wrong)


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


def test_a_name_that_is_too_long_for_a_file_has_no_captions(tmp_path: Path) -> None:
    """A table that is evaluated may name such a mask."""
    assert captions_of(tmp_path / ("b" * 300 + ".png")) == []
