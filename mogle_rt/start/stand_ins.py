"""Modules that stand in for others and import them only when more is asked of them than a few names.

Some packages import hundreds of modules, or read thousands of files, when they are imported. A stand-in gives the few
names that are needed here from the modules that define them. Anything else makes it run the package's own code, so that a
stand-in can do all that the package can, only later.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """A module in place of another one.

    Args:
        name: of the module, which must not be imported yet. The modules that it belongs to are imported.
        known: what it gives without running the module's own code: values, or names of modules that define them.
        version: the distribution whose version it gives as ``__version__``.

    Raises:
        ImportError: there is no such module.
    """

    def __init__(self, name: str, known: Mapping[str, Any], *, version: str | None = None) -> None:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            raise ImportError(f"no module named {name!r}")
        super().__init__(name)
        self.__spec__, self.__file__, self.__loader__ = spec, spec.origin, spec.loader
        if spec.submodule_search_locations is not None:
            self.__path__ = list(spec.submodule_search_locations)
            self.__package__ = name
        else:
            self.__package__ = name.rpartition(".")[0]
        if version is not None:
            self.__version__ = importlib.metadata.version(version)
        self._known = dict(known)
        self._real: ModuleType | None = None
        sys.modules[name] = self
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_known", "_real"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in self._known and self._real is None:
            known = self._known[name]
            value = getattr(importlib.import_module(known), name) if isinstance(known, str) else known
            setattr(self, name, value)
            return value
        if self._real is None and hasattr(self, "__path__"):
            full = f"{self.__name__}.{name}"
            if importlib.util.find_spec(full) is not None:
                return importlib.import_module(full)
        self.load()
        if self._real is not self:
            return getattr(self._real, name)
        try:
            return vars(self)[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None

    def forget(self, names: Iterable[str]) -> None:
        """Give these names no longer without the module's own code."""
        for name in names:
            self._known.pop(name, None)
            vars(self).pop(name, None)

    def load(self) -> None:
        """Run the module's own code, once. It may put another module in its own place."""
        if self._real is None:
            self._real = self
            assert self.__spec__ is not None
            assert self.__spec__.loader is not None
            self.__spec__.loader.exec_module(self)
            self._real = sys.modules[self.__name__]


@contextmanager
def few_distributions() -> Iterator[None]:
    """Meanwhile, the search for all installed distributions, which opens each of their lists of files, finds few."""
    search = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: {"PIL": ["pillow"], "yaml": ["pyyaml"]}
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = search
