"""Figures that are measured once: by name, in a note of the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.store import Store, sha256_json


class Kept:
    """Figures of one setting, each on disk as soon as it is there: a kill loses the one under way.

    `compress gc` removes them like everything that no run names; they are measured again then.
    """

    def __init__(self, store: Store, settings: Any) -> None:
        """`settings`: all that the figures depend on besides their names."""
        self.store = store
        self.key = sha256_json(settings)
        self.settings = settings
        self._figures: dict[str, Any] = store.note(self.key).get("figures", {})

    def __contains__(self, name: str) -> bool:
        return name in self._figures

    def __getitem__(self, name: str) -> Any:
        return self._figures[name]

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The figure of that name, measured now where it is not there."""
        if name not in self._figures:
            self._figures[name] = measure()
            self.store.note(self.key, {"settings": self.settings, "figures": self._figures})
        return self._figures[name]
