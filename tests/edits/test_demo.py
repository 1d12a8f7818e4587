"""With the demo, an edit draws hair that was painted into a mask, and the blend makes it fit the rest of the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.edits import HAIR, hair_edits, mirror, with_more_hair
from mogle_rt import Pipeline
from mogle_rt.bundle.shipped import examples
from mogle_rt.edits.regions import pixel_weights
from mogle_rt.masks import to_labels
from mogle_rt.quality.judges.demo import DemoJudge

STEPS, MARGIN = 6, 8


def test_painted_hair_is_drawn_and_the_rest_stays() -> None:
    edit = next(hair_edits())
    region = edit.before != edit.after
    pipe = Pipeline("demo", device="cpu", dtype="fp32")
    options: dict[str, Any] = {"num_inference_steps": STEPS, "seed": edit.seed}
    image = pipe(edit.before, edit.prompt, **options).images[0]
    result = pipe.edit(image, edit.before, edit.after, edit.prompt, margin=MARGIN, **options).images[0]
    old, new = np.asarray(image), np.asarray(result)
    judge = DemoJudge()
    shares = [float((judge.labels([x])[0][region] == HAIR).mean()) for x in (old, new)]
    assert shares[0] < 0.2
    assert shares[1] > 0.8
    outside = pixel_weights(region, MARGIN, MARGIN // 2)[0].numpy() == 0
    assert outside.mean() > 0.3
    assert (old == new)[outside].all()


@pytest.mark.quick
def test_the_benchmark_s_edits_only_add_hair() -> None:
    edits = list(hair_edits())
    assert len(edits) >= 50
    for edit in edits:
        changed = edit.before != edit.after
        assert changed.sum() >= 40
        assert (edit.after[changed] == HAIR).all()


@pytest.mark.quick
def test_mirror_images_have_left_and_right_exchanged() -> None:
    labels = to_labels(examples()[0].mask)
    flipped = mirror(labels, True)
    assert (flipped == 4).sum() == (labels == 5).sum()
    assert (flipped[:, ::-1] == 1).sum() == (labels == 1).sum()
    assert (mirror(flipped, True) == labels).all()
    assert (with_more_hair(labels, 0) != labels).any()
