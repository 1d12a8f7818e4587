"""Counting counts what its own thread does, and nothing of other threads."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from mogle_rt import Pipeline
from mogle_rt.cost.counting import Count, counting
from mogle_rt.ops.attention import AttentionPlan, Visibility, joint_attention
from tests.torch_api.test_settings import draw

SCALED = AttentionPlan(Visibility.SCALED, torch.full((1,), 0.5, device="meta"))


def attention_count() -> Count:
    q = torch.empty(300, 1, 2, 16, device="meta", dtype=torch.bfloat16)
    with counting() as counter:
        joint_attention(q, q, q, 200, SCALED)
        return counter.take()


def test_another_thread_draws_meanwhile(tiny_bundle: Path) -> None:
    """Both threads use the attention that returns log-sum-exps: one draws with it, the other has it counted."""
    pipe = Pipeline(tiny_bundle, device="cpu", dtype="fp32")
    expected, alone = draw(pipe, condition_scale=2.0), attention_count()
    assert alone.launches > 0
    counted: list[Count] = []
    with counting() as outer:  # counts this thread, and nothing of the other one
        drawn: list[torch.Tensor] = []
        other = threading.Thread(target=lambda: drawn.append(draw(pipe, condition_scale=2.0)))
        other.start()
        while other.is_alive():
            counted.append(attention_count())
        other.join()
        inner = len(counted)
    assert torch.equal(drawn[0], expected)
    assert inner > 0
    assert set(counted) == {alone}
    assert outer.take().launches == inner * alone.launches
