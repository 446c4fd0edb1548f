"""A small strict dictionary of names: refuses duplicates, and an unknown name lists the near ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from mdistiller_norm.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, candidates: Iterable[str]) -> list[str]:
    """Up to three candidates that look most like ``name`` (case ignored), best first; empty when none is close."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]


class Registry(Mapping[str, T], Generic[T]):
    """Names to things of one kind.

    Args:
        kind: what the things are, for messages ("model", "distiller").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its subject under ``name``.

        Raises:
            ValueError: the name is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """The entry of that name.

        Raises:
            ConfigError: no such name; the message lists the near ones, or all.
        """
        if name in self._entries:
            return self._entries[name]
        near = nearest(name, self._entries)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(self._entries))}"
        raise ConfigError(f"unknown {self.kind} {name!r}: {hint}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
