"""The metrics of an evaluation: what each needs, which judge it asks, and what it puts into the report."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mogle_rt.errors import CheckpointError
from mogle_rt.masks.classes import CLASS_NAMES, Labels
from mogle_rt.masks.labels import resize
from mogle_rt.masks.orders import Order
from mogle_rt.quality import UnmeasurableError
from mogle_rt.quality.bootstrap import Counts, draws, figure, of_mean
from mogle_rt.quality.distances import cmmd, fid, kid
from mogle_rt.quality.drift import rms_difference
from mogle_rt.quality.judges.choice import Bench
from mogle_rt.quality.judges.colours import REGIONS, ColourJudge
from mogle_rt.quality.judges.contract import FeatureJudge
from mogle_rt.quality.pictures import Picture, read_picture
from mogle_rt.quality.regions import Overlap, face_like
from mogle_rt.quality.report import AGAINST, Measured, Report, Values
from mogle_rt.quality.rows import Row


class Evaluation:
    """One evaluation at work: it fills a report, metric by metric. What several metrics need is computed once."""

    def __init__(
        self,
        report: Report,
        real: Sequence[Path],
        bench: Bench,
        order: Order,
        batch_size: int,
        resamples: int,
        seed: int,
        progress: bool,
        note: Callable[[str], object],
    ) -> None:
        self._report, self._rows, self._real, self._bench = report, report.rows, real, bench
        self._order, self._batch_size, self._resamples, self._seed = order, batch_size, resamples, seed
        self._progress, self._note = progress, note
        self._groups = np.array([row.group for row in report.rows])
        self._features: dict[int, tuple[Tensor, Tensor]] = {}
        self._parsed: dict[str, Any] | None = None

    def measure(self, name: str) -> None:
        """Measure one metric.

        Raises:
            UnmeasurableError: what it needs isn't there.
            CheckpointError: its judge can't be opened.
            InputError: an image or a mask can't be read.
        """
        if name in AGAINST and not self._real:
            raise UnmeasurableError(f"{name} needs real images; give a folder of them with --against")
        getattr(self, f"_measure_{name}")()

    def _measure_fid(self) -> None:
        x, y = self._both(self._bench.features, "fid")
        self._put("fid", fid(x, y, self._counts()), self._bench.features)
        fewest = min(len(x), len(y))
        if fewest <= x.shape[1]:
            self._note(
                f"fid: {fewest:,} images are few for {x.shape[1]:,} features: it falls as images are added; compare it at "
                "equal counts alone, or take kid or cmmd"
            )

    def _measure_kid(self) -> None:
        x, y = self._both(self._bench.features, "kid")
        self._put("kid", kid(x, y, self._counts(), self._seed), self._bench.features)

    def _measure_cmmd(self) -> None:
        x, y = self._both(self._bench.clip, "cmmd")
        self._put("cmmd", cmmd(x, y, self._counts()), self._bench.clip)

    def _measure_clip(self) -> None:
        chosen = self._with_prompts("clip")
        judge, scores, cut = self._bench.clip, self._nothing(), 0
        for places, pictures in self._batches(chosen, "clip"):
            texts, too_long = judge.texts([str(self._rows[i].prompt) for i in places])
            scores[places] = 100 * (judge.features(pictures) * texts).sum(1).double().numpy()
            cut += too_long
        if cut:
            self._note(
                f"clip: {cut:,} of {len(chosen):,} prompts have more than {judge.most_tokens} tokens, and are cut"
            )
        self._put_values("clip", scores, judge)

    def _measure_reward(self) -> None:
        chosen = self._with_prompts("reward")
        judge, scores = self._bench.reward, self._nothing()
        for places, pictures in self._batches(chosen, "reward"):
            scores[places] = judge.scores(pictures, [str(self._rows[i].prompt) for i in places])
        self._put_values("reward", scores, judge)

    def _measure_mask(self) -> None:
        if not any(row.mask is not None or row.inside for row in self._rows):
            raise UnmeasurableError("mask needs masks: none is within the images; give a folder of them with --masks")
        found = self._regions()
        places, overlap = found["masked"], Overlap.joined(found["overlaps"])
        iou = overlap.iou_of_classes()
        counts = draws(self._groups[places], self._resamples, self._seed)
        replicates = np.nanmean(overlap.iou_of_classes(counts), 1) if self._resamples else np.array([])
        self._put("miou", figure(float(np.nanmean(iou)), replicates, len(places)), self._bench.parser)
        self._report.classes = {CLASS_NAMES[c]: float(v) for c, v in enumerate(iou) if not np.isnan(v)}
        each = self._report.values["miou"] = self._nothing()
        each[places] = overlap.iou_of_images()
        shares = self._nothing()
        shares[places] = overlap.accuracy_of_images()
        self._put_values("accuracy", shares, self._bench.parser)

    def _measure_faces(self) -> None:
        self._put_values("faces", self._regions()["faces"], self._bench.parser)

    def _measure_colours(self) -> None:
        if self._bench.parser is not self._bench.demo:
            raise UnmeasurableError("colours is for images of the demo alone; --parser demo says that they are such")
        self._with_prompts("colours")
        verdicts = self._regions()["colours"]
        hits = {a: [one[a] for one in verdicts if a in one] for a in REGIONS}
        if not any(hits.values()):
            raise UnmeasurableError("colours: no prompt names a colour of the demo's, as in: a woman with red hair")
        self._report.colours = {a: (sum(h), len(h)) for a, h in hits.items() if h}
        shares = np.array([np.mean(list(one.values())) if one else np.nan for one in verdicts])
        self._put_values("colours", shares, self._bench.demo)

    def _measure_identity(self) -> None:
        chosen = [i for i, row in enumerate(self._rows) if row.real is not None]
        if not chosen:
            names = " or ".join(self._rows[0].keys)
            raise UnmeasurableError(
                f"identity needs real images of the images' names; that of {self._rows[0].name} must be named {names}"
            )
        judge, cosines = self._bench.face, self._nothing()
        for places, pictures in self._batches(chosen, "identity"):
            real = [read_picture(path) for i in places if (path := self._rows[i].real) is not None]
            a, b = (torch.nn.functional.normalize(judge.features(x).double(), dim=1) for x in (pictures, real))
            cosines[places] = (a * b).sum(1).numpy()
        if judge is self._bench.clip:
            self._note(
                "identity: by CLIP's embeddings, which see more than the person; --face gives a network for faces"
            )
        self._put_values("identity", cosines, judge)

    def _measure_diversity(self) -> None:
        groups: dict[str, list[int]] = {}
        for i, group in enumerate(self._groups):
            groups.setdefault(group, []).append(i)
        several = {group: places for group, places in groups.items() if len(places) > 1}
        if not several:
            raise UnmeasurableError(
                "diversity needs several images of one mask, or of one prompt; generate draws them with -n"
            )
        try:
            judge: FeatureJudge = self._bench.features
        except CheckpointError:
            if self._report.settings["features"] is not None:
                raise
            judge = self._bench.clip
        seen, pixels = [], []
        for places in tqdm(several.values(), "diversity", disable=not self._progress, leave=False):
            pictures = [read_picture(self._rows[i].image) for i in places]
            parts = [judge.maps(pictures[k : k + self._batch_size]) for k in range(0, len(pictures), self._batch_size)]
            maps = [unit(torch.cat(depth)) for depth in zip(*parts, strict=True)]
            pairs = list(itertools.combinations(range(len(places)), 2))
            seen.append(np.mean([sum(apart(m[i], m[j]) for m in maps) for i, j in pairs]))
            pixels.append(np.mean([rms_difference(pictures[i], pictures[j]) for i, j in pairs]))
        for name, values in (("diversity", seen), ("pixels", pixels)):
            found = of_mean(np.array(values), np.arange(len(values)), self._resamples, self._seed)
            self._report.figures[name] = Measured(found, judge.name if name == "diversity" else "pixels")

    def _regions(self) -> dict[str, Any]:
        """What the parser finds, once for all: overlaps with masks, which images are faces, and whose colours are right."""
        if self._parsed is None:
            parser, judge = self._bench.parser, ColourJudge()
            self._report.parser = parser
            faces, colours, masked = self._nothing(), list[dict[str, bool]](), list[int]()
            overlaps = list[Overlap]()
            for places, pictures in self._batches(range(len(self._rows)), "mask"):
                for i, picture, found in zip(places, pictures, parser.labels(pictures), strict=True):
                    wanted = self._mask_of(self._rows[i], picture)
                    faces[i] = face_like(found)
                    if wanted is not None:
                        masked.append(i)
                        overlaps.append(Overlap.of([found], [wanted]))
                    named = judge.named(self._rows[i].prompt or "")
                    colours.append(judge.verdicts(picture, found if wanted is None else wanted, named))
            self._parsed = {"faces": faces, "colours": colours, "masked": np.array(masked, int), "overlaps": overlaps}
        return self._parsed

    def _mask_of(self, row: Row, picture: Picture) -> Labels | None:
        labels = row.labels(self._order)
        return None if labels is None else resize(labels, *picture.shape[:2])

    def _both(self, judge: FeatureJudge, name: str) -> tuple[Tensor, Tensor]:
        """The features of the images, and of the real ones."""
        if id(judge) not in self._features:
            self._features[id(judge)] = (
                self._seen_by(judge, [row.image for row in self._rows], name),
                self._seen_by(judge, self._real, f"{name}, real"),
            )
        return self._features[id(judge)]

    def _seen_by(self, judge: FeatureJudge, paths: Sequence[Path], name: str) -> Tensor:
        parts = [paths[k : k + self._batch_size] for k in range(0, len(paths), self._batch_size)]
        shown = tqdm(parts, name, disable=not self._progress, leave=False)
        return torch.cat([judge.features([read_picture(path) for path in part]) for part in shown])

    def _batches(self, places: Sequence[int], name: str) -> Iterator[tuple[list[int], list[Picture]]]:
        starts = range(0, len(places), self._batch_size)
        for k in tqdm(starts, name, disable=not self._progress, leave=False):
            some = list(places[k : k + self._batch_size])
            yield some, [read_picture(self._rows[i].image) for i in some]

    def _with_prompts(self, name: str) -> list[int]:
        chosen = [i for i, row in enumerate(self._rows) if row.prompt]
        if not chosen:
            raise UnmeasurableError(
                f"{name} needs prompts: none is within the images; give a folder of them with --captions"
            )
        return chosen

    def _counts(self) -> tuple[Counts, Counts]:
        """The resamples of the images, and of the real ones."""
        return (
            draws(self._groups, self._resamples, self._seed),
            draws(np.arange(len(self._real)), self._resamples, self._seed + 1),
        )

    def _nothing(self) -> Values:
        return np.full(len(self._rows), np.nan)

    def _put(self, name: str, found: Any, judge: Any) -> None:
        self._report.figures[name] = Measured(found, judge.name)

    def _put_values(self, name: str, values: Values, judge: Any) -> None:
        self._report.values[name] = values
        self._put(name, of_mean(values, self._groups, self._resamples, self._seed), judge)


def unit(maps: Tensor) -> Tensor:
    """Maps [n, C, ...] whose vectors of channels have length 1, [n, C, places]."""
    return torch.nn.functional.normalize(maps.flatten(2), dim=1)


def apart(a: Tensor, b: Tensor) -> float:
    """The distance of two maps [C, places] as in LPIPS, all channels alike: the mean square of a place's difference."""
    return float((a - b).square().sum(0).mean())
