"""The settings of fast modes: what they may be, what texts mean, what is stored beside a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import mogle_rt
from mogle_rt import FastConfig
from mogle_rt.bundle.bundle import Bundle
from mogle_rt.errors import ConfigError
from mogle_rt.fast.choice import NAMED, chosen, read_stored, said, stored_path, write_stored
from mogle_rt.fast.settings import POLICIES

pytestmark = pytest.mark.quick


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle(shutil.copy(tiny_bundle, tmp_path / "own.safetensors"))


def test_nothing_is_left_out_by_default() -> None:
    config = FastConfig()
    assert config.exact
    assert config.mask is None
    assert not config.extrapolates
    assert FastConfig(steps_mask="111").exact


def test_policies_are_masks_for_28_steps() -> None:
    assert {name: (len(mask), mask.count("1")) for name, mask in POLICIES.items()} == {
        "slow": (28, 18),
        "medium": (28, 15),
        "fast": (28, 11),
        "ultra": (28, 8),
    }
    assert POLICIES["fast"] == "1111110100010000100000100001"


@pytest.mark.parametrize("given", ["1101", [1, 1, 0, 1], (True, True, False, True)], ids=repr)
def test_masks_of_every_form(given: Any) -> None:
    config = FastConfig(steps_mask=given)
    assert config.steps_mask == "1101"
    assert config.mask == (True, True, False, True)
    assert FastConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(FastConfig(steps_mask="1101"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"steps_mask": "quick"},
            "steps_mask must be 'slow', 'medium', 'fast', 'ultra', or a 1 for each .* got 'quick'",
        ),
        ({"steps_mask": ""}, "steps_mask must be"),
        ({"steps_mask": [1, 2]}, "steps_mask must be"),
        ({"steps_mask": [1.0, 0.0]}, "steps_mask must be"),
        ({"steps_mask": 5}, "steps_mask must be .* got 5"),
        ({"steps_mask": "1" * 10_001}, "at most 10000 of them"),
        ({"order": 2}, "order must be from 0 to 1, got 2"),
        ({"order": True}, "order must be a whole number, got True"),
        ({"most_steps": 0}, "most_steps must be from 1 to 10000, got 0"),
        ({"most_steps": 2.5}, "most_steps must be a whole number, got 2.5"),
        ({"mask": "10"}, "unknown option 'mask'"),
        ({"refresh_every": 0}, "refresh_every must be from 1 to 10000, got 0"),
        ({"max_change": -0.1}, "max_change must be from 0 to 100, got -0.1"),
        ({"max_change": 0.1, "steps_mask": "10"}, "max_change and steps_mask exclude each other"),
        ({"max_change": 0.1, "refresh_every": 2}, "max_change and refresh_every exclude each other"),
        ({"max_change": 0.1, "max_skips": 0}, "max_skips must be from 1 to 10000, got 0"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FastConfig.from_mapping(given)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("balanced", NAMED["balanced"]),
        ("fast", NAMED["fast"]),
        ("steps_mask=1100", FastConfig(steps_mask="1100")),
        (" steps_mask = fast , order = 0 ", FastConfig(steps_mask="fast", order=0)),
        ("max_change=0.1,max_skips=3", FastConfig(max_change=0.1, max_skips=3)),
        ("refresh_every=4", FastConfig(refresh_every=4)),
        ('{"steps_mask": [1, 0]}', FastConfig(steps_mask="10")),
    ],
)
def test_texts(text: str, meant: FastConfig) -> None:
    assert said(text) == meant
    assert FastConfig.parse(str(meant)) == meant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slow", "fast must be 'balanced', 'fast' or settings such as 'steps_mask=fast,order=1', got 'slow'"),
        ("order=much", "order must be a whole number, got 'much'"),
        ("order=1,steps_mask", "fast must be settings such as"),
        ("ordre=1", "fast: unknown option 'ordre'; did you mean 'order'"),
        ("{", "fast is not JSON"),
    ],
)
def test_wrong_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        said(text)


def test_names_mean_what_is_stored_beside_the_bundle(bundle: Bundle) -> None:
    assert chosen("balanced", bundle) == NAMED["balanced"]
    own = FastConfig(steps_mask="10", order=0)
    path = write_stored(bundle, {"balanced": own}, {"psnr": 40.5})
    assert path == stored_path(bundle.path) == bundle.path.with_name("own.fast.json")
    assert read_stored(bundle) == {"balanced": own}
    assert chosen("balanced", bundle) == own
    assert chosen("fast", bundle) == NAMED["fast"]
    assert mogle_rt.Pipeline(bundle.path, fast="balanced").fast == own


def test_most_steps() -> None:
    config = FastConfig.parse("most_steps=15")
    assert str(config) == "most_steps=15"
    assert not config.exact
    assert [config.steps_of(asked) for asked in (1, 15, 28)] == [1, 15, 15]
    assert FastConfig(steps_mask="fast").steps_of(28) == 28


def test_the_settings_can_be_stored_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "own.fast.json"
    assert write_stored(bundle, {"fast": FastConfig(most_steps=3)}, path=elsewhere) == elsewhere
    assert read_stored(bundle) == {}
    shutil.copy(elsewhere, bundle.path.parent)
    assert read_stored(bundle) == {"fast": FastConfig(most_steps=3)}


def test_nothing_left_out_is_none(bundle: Bundle) -> None:
    assert chosen(None, bundle) is chosen(FastConfig(), bundle) is chosen({"steps_mask": "1"}, bundle) is None
    write_stored(bundle, {"fast": FastConfig()})  # where no setting was within what was asked for
    assert chosen("fast", bundle) is None
    with pytest.raises(ConfigError, match="fast must be a name, a FastConfig or None, got 3"):
        chosen(3, bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "0" * 64}, r"own\.fast\.json: was measured for another bundle than own\.safetensors; run"),
        ({"kind": "of another program"}, r"own\.fast\.json: kind must be one of"),
        ({"settings": {"fast": {"order": 7}}}, "order must be from 0 to 1, got 7"),
        ({"settings": 3}, r"own\.fast\.json\.settings must be an object, got 3"),
    ],
)
def test_other_files_are_refused(bundle: Bundle, change: dict[str, Any], message: str) -> None:
    path = write_stored(bundle, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        chosen("fast", bundle)


def test_a_damaged_file_is_told(bundle: Bundle) -> None:
    path = write_stored(bundle, {})
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"own\.fast\.json: is not JSON"):
        chosen("fast", bundle)
