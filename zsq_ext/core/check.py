"""Checks of a configuration's fields, all in one form of words."""

from __future__ import annotations


def require(owner: str, name: str, value: object, holds: bool, rule: str) -> None:
    """Raises ``ValueError: <owner>: <name> must <rule>, got <value>`` unless it holds."""
    if not holds:
        raise ValueError(f"{owner}: {name} must {rule}, got {value!r}")
