"""Which fast mode is meant: by a name, by settings, or by those that were measured for a bundle and stored beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogle_rt.bundle.files import atomic_write
from mogle_rt.errors import ConfigError
from mogle_rt.fast.settings import FastConfig
from mogle_rt.values import OneOf, parsed, quoted, read_json

if TYPE_CHECKING:
    from mogle_rt.bundle.bundle import Bundle

# What the names mean where nothing was measured. What they cost on a model is not known then.
NAMED = {"balanced": FastConfig(steps_mask="medium"), "fast": FastConfig(steps_mask="fast")}
KIND = "mogle-rt fast settings 1"  # of the file, with its version


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Settings that were measured for a bundle, as its file holds them.

    Attributes:
        kind: `KIND`. bundle: the content hash of the bundle.
        settings: by name, each as of `FastConfig.to_dict`.
        measured: what was measured, for people; nothing reads it.
    """

    kind: str
    bundle: str
    settings: Mapping[str, Mapping[str, Any]]
    measured: Any = field(default=None)


def stored_path(bundle: Path) -> Path:
    """Where a bundle's settings are stored: ``ckpt.fast.json`` beside ``ckpt.safetensors``."""
    return bundle.with_suffix(".fast.json")


def write_stored(
    bundle: Bundle, settings: Mapping[str, FastConfig], measured: Any = None, path: Path | None = None
) -> Path:
    """Store the settings that were measured for a bundle, and return the file's path.

    Args:
        settings: by name; each of `NAMED` may be there.
        measured: anything that JSON can hold.
        path: of the file; None means beside the bundle, where `read_stored` finds it.

    Raises:
        OutputError: the file can't be written.
    """
    import json

    path = stored_path(bundle.path) if path is None else path
    stored = {
        "kind": KIND,
        "bundle": bundle.content_hash,
        "settings": {name: config.to_dict() for name, config in settings.items()},
        "measured": measured,
    }
    with atomic_write(path) as file:
        file.write((json.dumps(stored, indent=2) + "\n").encode())
    return path


def read_stored(bundle: Bundle) -> dict[str, FastConfig]:
    """The settings that are stored beside a bundle, by name; empty where there is no file.

    Raises:
        ConfigError: the file is damaged, or is about another bundle.
    """
    path = stored_path(bundle.path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    try:
        stored = parsed(Stored, read_json(text), str(path))
        OneOf(KIND)(stored.kind, f"{path}: kind")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from None
    if stored.bundle != bundle.content_hash:
        raise ConfigError(
            f"{path}: was measured for another bundle than {bundle.path.name}; run mogle-rt calibrate again, or remove it"
        )
    return {name: FastConfig.from_mapping(given, what=f"{path}: {name}") for name, given in stored.settings.items()}


def chosen(asked: object, bundle: Bundle) -> FastConfig | None:
    """The settings that are asked for; None where nothing is left out.

    Args:
        asked: None, a `FastConfig`, a mapping of its values, a text as of `FastConfig.parse`, or one of `NAMED`. A name
            means what is stored beside the bundle, if it is stored there, and otherwise the entry of `NAMED`.

    Raises:
        ConfigError: it is something else, or what is stored can't be used.
    """
    if asked is None:
        return None
    if isinstance(asked, str):
        config = said(asked)
        if asked in NAMED:
            config = read_stored(bundle).get(asked, config)
    elif isinstance(asked, Mapping):
        config = FastConfig.from_mapping(asked, what="fast")
    elif isinstance(asked, FastConfig):
        config = asked
    else:
        raise ConfigError(f"fast must be a name, a FastConfig or None, got {quoted(asked)}")
    return None if config.exact else config


def said(text: str) -> FastConfig:
    """The settings that a text means, before a bundle's own are looked at.

    Raises:
        ConfigError: it means none.
    """
    if text in NAMED:
        return NAMED[text]
    if "=" in text or text.lstrip().startswith("{"):
        return FastConfig.parse(text)
    names = ", ".join(map(repr, NAMED))
    raise ConfigError(f"fast must be {names} or settings such as 'steps_mask=fast,order=1', got {quoted(text)}")


class FastModes:
    """The part of a pipeline that holds its fast mode. `Pipeline` sets the attributes."""

    bundle: Bundle
    _options: dict[str, Any]
    _fast: FastConfig | None = None

    @property
    def fast(self) -> FastConfig | None:
        """What the next call leaves out; None leaves nothing out. It can be set to whatever `Pipeline` takes."""
        return self._fast

    @fast.setter
    def fast(self, asked: str | FastConfig | Mapping[str, Any] | None) -> None:
        config = chosen(asked, self.bundle)
        if config is not None and self._options["engine"] != "torch":
            config.check_exported()
        self._fast = config
        self._options = self._options | {"fast": asked}

    def steps_of(self, asked: int) -> int:
        """How many steps the next call has that is asked for with ``asked``."""
        return asked if self._fast is None else self._fast.steps_of(asked)
