"""A pipeline's methods for LoRAs as styles, with the names and behaviour of those of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mogle_rt.bundle.bundle import Bundle
from mogle_rt.calls.turns import TakesTurns
from mogle_rt.conversion.adapter_settings import FILE_NAMES
from mogle_rt.conversion.hub import find
from mogle_rt.conversion.lora import read_adapter
from mogle_rt.engines.contract import Engine
from mogle_rt.engines.torch_engine import TorchEngine
from mogle_rt.errors import ConfigError
from mogle_rt.model.styles import Styles

DEFAULT_FILE = FILE_NAMES[-1]


class LoraMethods(TakesTurns):
    """The pipeline's LoRA methods. They wait for running calls, as calls wait for one another."""

    bundle: Bundle
    engine: Engine

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        weight: float = 1.0,
    ) -> None:
        """Load a FLUX LoRA as a style. It takes effect with the next call, in addition to the adapters already active.

        It acts on text and image as in plain FLUX, and never on the mask's own stream. It is not merged into the model:
        after `unload_lora_weights`, images are bit for bit the same as before.

        Args:
            pretrained_model_name_or_path: a safetensors file, a folder in the layout of peft or diffusers, or a hub id.
                See `mogle_rt.conversion.lora.read_adapter` for the supported tensor names.
            weight_name: the file's name in the folder or the hub's repository, if it is not the usual one.
            adapter_name: the adapter's name; "default_0", "default_1" and so on by default.
            weight: the adapter's strength; 1 is as trained, 0 has no effect.

        Raises:
            CheckpointError: there is no such file, or it is not a LoRA for a transformer of this shape.
            ConfigError: the engine runs an exported graph.
            InputError: the name is taken, the weight is not a finite number, the ranks add up to more than
                `mogle_rt.model.styles.MOST_RANK`, or a callback calls this method during a call.
        """
        with self._styles() as styles:
            path = find(pretrained_model_name_or_path, default_file=weight_name or DEFAULT_FILE)
            if weight_name is not None and path.is_dir():
                path /= weight_name
            if adapter_name is None:
                numbered = (f"default_{i}" for i in range(len(styles.names) + 1))
                adapter_name = next(name for name in numbered if name not in styles.names)
            styles.load(adapter_name, read_adapter(path, self.bundle.config.transformer), weight)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make these adapters active from the next call on, and no others.

        Args:
            adapter_names: one name or a list of names; an empty list deactivates all adapters.
            adapter_weights: the strength of each adapter, or one number for all; 1 by default.

        Raises:
            ConfigError: the engine runs an exported graph.
            InputError: see `mogle_rt.model.styles.Styles.activate`.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if adapter_weights is None:
            adapter_weights = 1.0
        if not isinstance(adapter_weights, Sequence) or isinstance(adapter_weights, str):
            adapter_weights = [adapter_weights] * len(names)
        with self._styles() as styles:
            styles.activate(names, adapter_weights)

    def unload_lora_weights(self) -> None:
        """Remove all adapters. From the next call on, the model draws without them."""
        with self._styles() as styles:
            styles.remove(styles.names)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove these adapters; the others stay as they are.

        Raises:
            ConfigError: the engine runs an exported graph.
            InputError: an adapter is unknown.
        """
        with self._styles() as styles:
            styles.remove([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def get_active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self.engine.styles.active) if isinstance(self.engine, TorchEngine) else []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of all loaded adapters, by the part of the model that they belong to, as in diffusers."""
        names = self.engine.styles.names if isinstance(self.engine, TorchEngine) else []
        return {"transformer": names} if names else {}

    @contextmanager
    def _styles(self) -> Iterator[Styles]:
        """Wait until no call is running, then give access to the engine's styles."""
        with self._turn():
            if not isinstance(self.engine, TorchEngine):
                raise ConfigError(
                    "this pipeline's engine runs an exported graph, which can't use LoRAs; to use them, make the "
                    'pipeline with engine="torch"'
                )
            yield self.engine.styles
