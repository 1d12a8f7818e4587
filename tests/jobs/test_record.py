"""The record of the jobs in a folder: a job goes on with its seed, settings are never mixed, and of several processes
only one takes an image."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mogle_rt.errors import OutputError
from mogle_rt.jobs.plan import Drawing, digest_of, mask_names
from mogle_rt.jobs.record import NAME, Job, JobRecord
from mogle_rt.jobs.work import Work

SETTINGS = {"bundle": "ab", "steps": 28}


def begin(
    folder: Path,
    masks: list[str],
    *,
    seed: int | None = None,
    drawn: int = 5,
    steps: int = 28,
    share: bool = True,
    hold_seed: bool = True,
) -> Job:
    with JobRecord(folder) as record:
        settings = SETTINGS | {"steps": steps}
        found = record.find(settings, seed, drawn, masks, share=share, hold_seed=hold_seed)
        begun = record.begin(settings, seed, drawn, masks, share=share, hold_seed=hold_seed)
        assert (found.seed, found.masks) == (begun.seed, begun.masks)
        return begun


@pytest.mark.quick
def test_a_job_goes_on_with_its_seed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert begin(folder, ["a", "b"], drawn=5).seed == 5
    assert begin(folder, ["a", "b"], drawn=6).seed == 5
    assert begin(folder, ["a", "b"], drawn=7, share=False).seed == 7  # a job of its own
    assert begin(folder, ["a", "b"], drawn=8).seed == 7  # the latest goes on
    assert begin(folder, ["a", "b"], seed=5).seed == 5
    assert begin(folder, ["a"], seed=9).seed == 9  # a job of another seed, beside the others
    assert len(JobRecord(folder).jobs) == 3


def test_masks_keep_their_numbers_where_others_are_added(tmp_path: Path) -> None:
    begin(tmp_path, ["b", "d"])
    assert begin(tmp_path, ["a", "b", "c", "d"]).masks == ["b", "d", "a", "c"]
    assert begin(tmp_path, ["c"]).masks == ["b", "d", "a", "c"]
    assert mask_names([Path("x/1.png"), Path("y/1.png"), None, None]) == ["1.png", "1.png (2)", "", " (2)"]


def test_a_mix_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, ["a"])
    with pytest.raises(OutputError, match=r"its images were drawn with steps 28, asked for is 8; give the same"):
        begin(tmp_path, ["a"], steps=8)
    with pytest.raises(OutputError, match=r"its images were drawn from seed 5, asked for is 6; leave --seed out"):
        begin(tmp_path, ["a"], seed=6, hold_seed=False)
    assert len(JobRecord(tmp_path).jobs) == 1
    begin(tmp_path, ["a"], steps=8, share=False)  # whoever doesn't ask to go on may draw what they like
    assert len(JobRecord(tmp_path).jobs) == 2


def of_mask(drawing: Drawing) -> str:
    return digest_of(drawing.mask)


def test_images_of_other_masks_prompts_and_settings_are_refused(tmp_path: Path) -> None:
    mask, path = tmp_path / "a.png", tmp_path / "a_5.png"
    mask.write_bytes(b"one")
    drawing = Drawing(mask, "a face", 5, path)
    with JobRecord(tmp_path) as record:
        job = record.begin(SETTINGS, None, 5, ["a.png"], share=True, hold_seed=True)
        record.drawn(job, drawing, digest_of(mask), 1.25)
    record = JobRecord(tmp_path)
    assert record.knows(path)
    assert record.seconds(path) == 1.25
    wrong = drawing._replace(prompt="a hat")
    assert record.check([wrong], SETTINGS, of_mask) == 0  # it isn't there
    path.touch()
    assert record.check([drawing], SETTINGS, of_mask) == 0
    assert record.check([drawing._replace(path=mask)], SETTINGS, of_mask) == 1  # nothing is known of this one
    for one, settings, mine, message in (
        (wrong, SETTINGS, of_mask, "was drawn for another prompt"),
        (drawing._replace(seed=6), SETTINGS, of_mask, "was drawn from another seed"),
        (drawing, SETTINGS, lambda _: "other", r"was drawn from another mask: .*a\.png has changed since"),
        (drawing._replace(options=(("height", 64),)), SETTINGS, of_mask, "was drawn with other options: none"),
        (drawing, SETTINGS | {"steps": 8}, of_mask, "was drawn with steps 28, asked for is 8"),
    ):
        with pytest.raises(OutputError, match=message):
            record.check([one], settings, mine)


def test_a_line_that_was_cut_costs_only_itself(tmp_path: Path) -> None:
    begin(tmp_path, ["a"])
    file = tmp_path / NAME
    file.write_bytes(file.read_bytes() + b'{"image": "a_5.p')
    assert begin(tmp_path, ["a", "b"]).seed == 5
    assert begin(tmp_path, ["b"]).masks == ["a", "b"]
    file.write_text('{"image": "a.png"}\n')
    with pytest.raises(OutputError, match=r"line 1 is not of a record of jobs"):
        JobRecord(tmp_path)


# Another process in the same folder: it takes the named images, prints which it got, and waits until it is ended.
OTHER = """
import sys
from pathlib import Path
from mogle_rt.jobs.plan import Drawing, digest_of, mask_names
from mogle_rt.jobs.record import JobRecord
folder = Path(sys.argv[1])
with JobRecord(folder) as record:
    record.begin({"bundle": "ab", "steps": 28}, None, 99, ["a"], share=True, hold_seed=True)
    print([record.claim(Drawing(None, "", 0, folder / name)) for name in sys.argv[2:]], flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(folder: Path, *names: str) -> Iterator[str]:
    """Start another process that takes these images. Yields which of them it got."""
    command = [sys.executable, "-c", OTHER, str(folder), *names]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def drawings(folder: Path, *names: str) -> list[Drawing]:
    return [Drawing(None, "", i, folder / name) for i, name in enumerate(names)]


def test_an_image_is_drawn_by_one_process(tmp_path: Path) -> None:
    """Images that another process draws are left to it. Where it ends without one, this process draws it in the end."""
    images = drawings(tmp_path, "a", "b", "c", "d")
    with JobRecord(tmp_path) as record:
        job = record.begin(SETTINGS, None, 5, ["a"], share=True, hold_seed=True)
        with other_process(tmp_path, "b", "d") as got:
            assert got == "[True, True]"
            (tmp_path / "a").touch()  # drawn by somebody since the job was planned
            work = Work(images, 1, lambda _: None, record, "skip", share=True)
            assert [[one.path.name for one in batch] for batch in work] == [["c"]]
            assert work.left == 3
            alone = Work(images[1:], 1, lambda _: None, record, "refuse", share=False)
            with pytest.raises(OutputError, match=r"b: another process draws it at the same time"):
                list(alone)
            work = Work(images, 2, lambda _: None, record, "skip", share=True)
            batches = iter(work)
            first = next(batches)
        assert [one.path.name for one in first] == ["c"]  # of the batch c, d
        (tmp_path / "c").touch()
        # The other process has ended, and left b and d.
        assert [[one.path.name for one in batch] for batch in batches] == [["b", "d"]]
        assert work.left == 1
        assert job.seed == JobRecord(tmp_path).jobs[0].seed == 5


def test_what_is_taken_here_is_refused_there(tmp_path: Path) -> None:
    with JobRecord(tmp_path) as record:
        record.begin(SETTINGS, None, 5, ["a"], share=True, hold_seed=True)
        (a, b) = drawings(tmp_path, "a", "b")
        assert record.claim(a)
        assert record.claim(b)
        record.release(b)
        with other_process(tmp_path, "a", "b") as got:
            assert got == "[False, True]"
