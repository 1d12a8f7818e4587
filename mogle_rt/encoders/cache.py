"""A cache of tensors with a limit in bytes. It drops the least recently used entries first."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

from mogle_rt.errors import ConfigError


class TensorCache:
    """A cache that drops its least recently used entries first. An entry is a tuple of tensors.

    Args:
        max_bytes: the largest total size of the entries in bytes; 0 turns the cache off.

    Raises:
        ConfigError: ``max_bytes`` is negative, or not a whole number.
    """

    def __init__(self, max_bytes: int) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 0:
            raise ConfigError(f"a cache's size must be 0 bytes or more, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> tuple[Tensor, ...] | None:
        """Return the entry, or None if there is none. ``hits`` and ``misses`` count these two cases."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, entry: tuple[Tensor, ...]) -> None:
        """Keep an entry, unless it is larger than the whole cache."""
        size = _nbytes(key, entry)
        if size > self.max_bytes:
            return
        if key in self._entries:
            self.nbytes -= _nbytes(key, self._entries.pop(key))
        self._entries[key] = entry
        self.nbytes += size
        while self.nbytes > self.max_bytes:
            self.nbytes -= _nbytes(*self._entries.popitem(last=False))

    def clear(self) -> None:
        """Drop every entry."""
        self._entries.clear()
        self.nbytes = 0


def _nbytes(key: Hashable, entry: tuple[Tensor, ...]) -> int:
    """What an entry takes, its key included: a key can be a long prompt, or the bytes of a mask."""
    parts = key if isinstance(key, tuple) else (key,)
    return sum(map(sys.getsizeof, parts)) + sum(t.nbytes for t in entry)
