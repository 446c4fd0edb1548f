"""A strict dictionary of registered objects: no name twice, and hints for unknown names."""

import difflib
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import NoReturn, TypeVar

from mdistiller_norm.errors import ConfigError

T = TypeVar("T")
PLUGINS: list[ModuleType] = []  # imported plugins


def nearest(name: str, candidates: Iterable[str]) -> list[str]:
    """Return up to three candidates that are similar to ``name``, ignoring case, the best first."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.5)]


def not_registered(name: str) -> str:
    """Return a hint if a plugin defines an object of this name, which it then did not register."""
    file = next((plugin.__file__ for plugin in PLUGINS if name in vars(plugin)), "")
    hint = "decorate it (methods: @distillers.register)"
    return f"{name} in {file} is not registered: {hint}" if file else ""


def suggest(name: str, candidates: Collection[str]) -> str:
    """Return a hint for an unknown name: register it, or the nearest candidates, or all if none is similar."""
    if hint := not_registered(name):
        return hint
    if near := nearest(name, candidates):
        return f"did you mean {' or '.join(near)}?"
    return f"choose from {', '.join(sorted(candidates))}"


class Registry(dict[str, T]):
    """Registered objects by name; ``kind`` names their kind in messages ("model", "distiller")."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under ``name``."""

        def add(entry: T) -> T:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self[name] = entry
            return entry

        return add

    def __missing__(self, name: str) -> NoReturn:
        raise ConfigError(f"unknown {self.kind} {name!r}: {suggest(name, self)}")
