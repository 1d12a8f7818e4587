"""Configurations of the VAE and the text encoders are refused where they ask for far more than real models do."""

from __future__ import annotations

from typing import Any

import pytest

from mogle_rt import ConfigError
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.bundle.components import TABLES, check_layers, component

pytestmark = pytest.mark.quick

DEMO: dict[str, Any] = {part: getattr(Bundle("demo").config, part) for part in TABLES}


@pytest.mark.parametrize("part", TABLES)
def test_what_is_known_passes_unchanged(part: str) -> None:
    known = component(part, DEMO[part])
    assert len(known) > 15
    assert all(list(v) == DEMO[part][n] if isinstance(v, tuple) else v == DEMO[part][n] for n, v in known.items())
    assert component(part, DEMO[part] | {"id2label": {}, "num_labels": 10**9, "auto_map": {}}) == known


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vae", {"layers_per_block": 10**6}, "vae: layers_per_block must be from 1 to 32, got 1000000"),
        ("vae", {"scaling_factor": 10**400}, "vae: scaling_factor must be a finite number, got a number of"),
        ("vae", {"scaling_factor": None}, "vae: scaling_factor must be a number, got None"),
        ("vae", {"scaling_factor": 0}, "vae: scaling_factor must be from 1e-06"),
        ("vae", {"shift_factor": float("nan")}, "vae: shift_factor must be a finite number, got nan"),
        ("vae", {"block_out_channels": [2**40]}, r"vae: block_out_channels\[0\] must be from 1 to 65536"),
        ("vae", {"down_block_types": ["os.system"]}, r"down_block_types\[0\] must be one of DownEncoderBlock2D"),
        ("vae", {"act_fn": "x" * 99}, "vae: act_fn must be a name"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers must be from 1 to 256"),
        ("text_encoder", {"max_position_embeddings": 10**9}, "max_position_embeddings must be from 1 to 65536"),
        ("text_encoder", {"eos_token_id": 10**30}, "text_encoder: eos_token_id must be from -1 to"),
        ("text_encoder_2", {"num_layers": True}, "text_encoder_2: num_layers must be a whole number, got True"),
        ("text_encoder_2", {"relative_attention_num_buckets": 1}, "num_buckets must be from 4 to"),
        ("text_encoder_2", {"vocab_size": 10**12}, "text_encoder_2: vocab_size must be from 1 to"),
    ],
)
def test_ranges(part: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        component(part, DEMO[part] | change)


def test_more_layers_than_tensors() -> None:
    with pytest.raises(ConfigError, match="num_layers is 200, but there are only 3 tensors"):
        check_layers("text_encoder_2", {"num_layers": 200}, 3)
