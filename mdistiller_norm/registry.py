"""A strict dictionary of names: no name twice, and hints for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from mdistiller_norm.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, candidates: Iterable[str]) -> list[str]:
    """Return up to three candidates that are similar to ``name``, ignoring case, the best first."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]


def suggest(name: str, candidates: Collection[str]) -> str:
    """Return a hint for an unknown name: the nearest candidates, or all of them if none is similar."""
    near = nearest(name, candidates)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(sorted(candidates))}"


class Registry(Mapping[str, T], Generic[T]):
    """Registered objects of one kind by name.

    Args:
        kind: kind of the objects, for messages ("model", "distiller").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under ``name``."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}: {suggest(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
