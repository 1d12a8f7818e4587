"""The record of the jobs in an output folder: with what settings and seed each was begun, and what is drawn of it.

An interrupted job goes on with the seed that it was begun with, several processes share one job, and images of other
settings are not mixed with its own without a word. The record is a file of JSON lines beside the images. A line tells of
a job (its settings, seed and masks), of masks that a job has got since, or of an image that was drawn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mogle_rt.errors import OutputError
from mogle_rt.jobs.claims import Claims
from mogle_rt.jobs.plan import Drawing, short_digest
from mogle_rt.values import Range, parsed, read_json, real, whole

NAME = "mogle-rt-jobs.jsonl"
SEEDS = Range(0, 2**63 - 1)
Settings = Mapping[str, Any]


@dataclass
class Job:
    """Images of one command.

    Attributes:
        settings: all that an image depends on besides its mask, prompt and seed; ready for JSON.
        seed: the first image's.
        masks: the names of the masks, in the order that numbers them.
        number: in the record, from 0; None where it isn't there yet.
    """

    settings: dict[str, Any]
    seed: int
    masks: list[str] = field(default_factory=list)
    number: int | None = None


class JobRecord:
    """The record of a folder, which is read at once and written from `begin` on.

    Args:
        folder: of the images; it may not be there yet.

    Raises:
        OutputError: what is there is no such record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self.jobs: list[Job] = []
        self._images: dict[str, dict[str, Any]] = {}
        self._file: FileIO | None = None
        self._claims: Claims | None = None
        if self.path.is_file():
            self._read(self.path.read_bytes())

    def find(
        self,
        settings: Settings,
        seed: int | None,
        drawn_seed: int,
        masks: Sequence[str],
        *,
        share: bool,
        hold_seed: bool,
    ) -> Job:
        """The job that a command means: one that goes on, or a new one.

        Args:
            settings: see `Job`.
            seed: the one that was asked for.
            drawn_seed: for a new job, where none was asked for.
            masks: the names of the command's masks.
            share: whether the command may go on with a job, its own or another process's.
            hold_seed: whether the images' names tell their seeds, so that jobs of several seeds can lie side by side.

        Raises:
            OutputError: the command is to go on, and the folder's jobs have other settings or, where the names don't tell
                it, another seed.
        """
        new = Job(dict(settings), drawn_seed if seed is None else seed, list(masks))
        same = [job for job in self.jobs if job.settings == new.settings]
        if share and self.jobs and not same:
            raise OutputError(self._mixed(f"{self.folder}: its images were drawn", self.jobs[-1].settings, settings))
        fitting = [job for job in same if seed in (None, job.seed)]
        if share and same and not fitting and not hold_seed:
            raise OutputError(
                f"{self.folder}: its images were drawn from seed {same[-1].seed}, asked for is {seed}; leave --seed out "
                "to go on, or choose another name for the images"
            )
        if not fitting or (seed is None and not share):
            return new
        job = fitting[-1]
        return Job(job.settings, job.seed, [*job.masks, *(m for m in masks if m not in set(job.masks))], job.number)

    def check(self, drawings: Iterable[Drawing], settings: Settings, digest: Callable[[Drawing], str]) -> int:
        """Check that images that are there already are those that would be drawn.

        Args:
            drawings: of which those that are there are checked.
            settings: see `Job`.
            digest: gives that of a drawing's mask, see `mogle_rt.jobs.plan.digest_of`.

        Returns:
            How many images are there that the record doesn't know.

        Raises:
            OutputError: an image was drawn with other settings or options, from another mask, or for another prompt.
        """
        unknown = 0
        for drawing in drawings:
            if not drawing.path.exists():
                continue
            fact = self._images.get(self._name(drawing.path))
            if fact is None:
                unknown += 1
                continue
            of, wanted = self.jobs[fact["job"]].settings, self._fact(drawing, digest(drawing))
            if of != dict(settings):
                raise OutputError(self._mixed(f"{drawing.path}: was drawn", of, settings))
            for key, what in (
                ("seed", "from another seed"),
                ("mask", f"from another mask: {drawing.mask} has changed since"),
                ("prompt", "for another prompt"),
                ("options", f"with other options: {_shown(fact.get('options'))}"),
            ):
                if fact.get(key) != wanted.get(key):
                    raise OutputError(
                        f"{drawing.path}: was drawn {what}; remove the image, draw it again with --overwrite, or choose "
                        "another folder"
                    )
        return unknown

    def begin(
        self,
        settings: Settings,
        seed: int | None,
        drawn_seed: int,
        masks: Sequence[str],
        *,
        share: bool,
        hold_seed: bool,
    ) -> Job:
        """Write down the job that `find` finds, as the record is by now: another process may have begun it meanwhile.

        Raises:
            OutputError: see `find`; or the record can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self.path, "a+")
        except OSError as error:
            raise OutputError(f"{self.path}: can't be written: {error.strerror or error}") from None
        self._claims = Claims(self._file)
        with self._claims.alone():
            self.reread()
            job = self.find(settings, seed, drawn_seed, masks, share=share, hold_seed=hold_seed)
            if job.number is None:
                job.number = len(self.jobs)
                self._append({"job": job.number, "seed": job.seed, "settings": job.settings, "masks": job.masks})
                self.jobs.append(job)
            elif more := job.masks[len(self.jobs[job.number].masks) :]:
                self._append({"job": job.number, "more_masks": more})
                self.jobs[job.number] = job
        return job

    def join(self, job: Job) -> None:
        """Take part in a job that another process has begun, perhaps on another machine.

        Raises:
            OutputError: this process doesn't see the record of that job.
        """
        try:
            self._file = FileIO(self.path, "r+")
        except OSError as error:
            raise OutputError(f"{self.path}: can't be opened: {error.strerror or error}") from None
        self._claims = Claims(self._file)
        with self._claims.alone():
            self.reread()
        if job.number is None or job.number >= len(self.jobs) or self.jobs[job.number].settings != job.settings:
            raise OutputError(f"{self.path}: is the record of other jobs, not of this one")

    def hold(self) -> bool:
        """Take the whole folder for this process, as long as it lives. False if another one holds it.

        Processes that draw single images of it are not kept out.
        """
        assert self._claims is not None
        return self._claims.claim("")

    def claim(self, drawing: Drawing) -> bool:
        """Take an image for this process. False if another process is at it."""
        assert self._claims is not None
        return self._claims.claim(self._name(drawing.path))

    def release(self, drawing: Drawing) -> None:
        """Others may take the image, if it isn't there."""
        assert self._claims is not None
        self._claims.release(self._name(drawing.path))

    def drawn(self, job: Job, drawing: Drawing, digest: str, seconds: float | None = None) -> None:
        """Write down what an image that is there was drawn from, or one that appears next.

        Args:
            digest: of its mask.
            seconds: how long it took.
        """
        assert self._claims is not None
        line = {"image": self._name(drawing.path), "job": job.number} | self._fact(drawing, digest)
        with self._claims.alone():
            self._append(line if seconds is None else line | {"seconds": round(seconds, 3)})

    def knows(self, path: Path) -> bool:
        """Whether it says what an image was drawn from."""
        return self._name(path) in self._images

    def seconds(self, path: Path) -> float | None:
        """How long an image took to draw; None if it isn't known."""
        return self._images.get(self._name(path), {}).get("seconds")

    def drawn_seeds(self) -> dict[str, int]:
        """The seed of each image that the record tells of, by the image's name within the folder."""
        return {name: fact["seed"] for name, fact in self._images.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @staticmethod
    def _fact(drawing: Drawing, digest: str) -> dict[str, Any]:
        """What an image was drawn from. The prompt itself is left out, as the images' own settings may be."""
        fact = {"seed": drawing.seed, "mask": digest, "prompt": short_digest(drawing.prompt.encode())}
        return fact | ({"options": json.loads(json.dumps(dict(drawing.options)))} if drawing.options else {})

    def _mixed(self, what: str, there: Settings, asked: Settings) -> str:
        name = next((n for n in {**there, **asked} if there.get(n) != asked.get(n)), "settings")
        return (
            f"{what} with {name} {_shown(there.get(name))}, asked for is {_shown(asked.get(name))}; give the same settings "
            "to go on, or choose another folder"
        )

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        end = self._file.seek(0, os.SEEK_END)
        whole = not end or os.pread(self._file.fileno(), 1, end - 1) == b"\n"
        start = b"" if whole else b"\n"  # after a line that a process could not finish
        content = start + json.dumps(line).encode() + b"\n"
        try:
            while content:  # a full disk takes a part of it, and refuses the rest
                content = content[self._file.write(content) :]
        except OSError as error:
            raise OutputError(f"{self.path}: can't be written: {error.strerror or error}") from None

    def reread(self) -> None:
        """Read it anew, with what other processes have written since. It must have been begun."""
        assert self._file is not None
        self._file.seek(0)
        self.jobs, self._images = [], {}
        self._read(self._file.readall())

    def _read(self, content: bytes) -> None:
        for number, text in enumerate(content.splitlines(), 1):
            try:
                line = read_json(text)
            except ValueError:  # a process could not finish it
                continue
            try:
                self._take(line)
            except (ValueError, KeyError, TypeError, IndexError):
                raise OutputError(
                    f"{self.path}: line {number} is not of a record of jobs; remove the file, or choose another folder"
                ) from None

    def _take(self, line: Any) -> None:
        if "settings" in line:
            settings = parsed(Mapping[str, Any], line["settings"], "settings")
            masks = list(parsed(tuple[str, ...], line["masks"], "masks"))
            self.jobs.append(Job(dict(settings), whole(line["seed"], "seed", SEEDS), masks, len(self.jobs)))
            return
        job = whole(line["job"], "job", Range(0, len(self.jobs) - 1))
        if "more_masks" in line:
            self.jobs[job].masks += parsed(tuple[str, ...], line["more_masks"], "more_masks")
        else:
            fact = {key: line[key] for key in ("job", "seed", "mask", "prompt")}
            if "options" in line:
                fact["options"] = parsed(Mapping[str, Any], line["options"], "options")
            if "seconds" in line:
                fact["seconds"] = real(line["seconds"], "seconds", Range(0, 1e9))
            self._images[parsed(str, line["image"], "image")] = fact


def job_settings(
    bundle: str,
    call: Settings,
    *,
    model_config: Settings,
    dtype: str | None,
    num_images: int = 1,
    embeds: Sequence[object] | None = None,
    fast: Settings | None = None,
) -> dict[str, Any]:
    """What all images of a job depend on besides their masks, prompts and seeds, as `Job.settings`.

    Args:
        bundle: its hash.
        call: the arguments of the pipeline's call that all images share.
        model_config, dtype: those of the pipeline, as they were asked for.
        num_images: of each mask.
        embeds: what tells the embeddings of the prompts, where no text encoder makes them.
        fast: what is left out, if anything is.
    """
    names = {"num_inference_steps": "steps", "guidance_scale": "guidance"}  # those of the options
    shown = {names.get(name, name): value for name, value in call.items()}
    given = {"bundle": bundle, "num_images": num_images, "embeds": None if embeds is None else list(embeds)}
    left_out = {} if fast is None else {"fast": dict(fast)}
    return given | shown | {"model_config": dict(model_config), "dtype": dtype} | left_out


def _shown(value: object) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
