"""The section of a report that says how a run was configured: every value that decided it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from zsq_ext.report import html
from zsq_ext.report.html import Html
from zsq_ext.report.result import Result


def configuration(result: Result, notes: Mapping[str, object]) -> Html:
    config = result.config
    names = {name: config[name] for name in ("method", "preset", "profile") if config.get(name) is not None}
    run = {**names, "bits": result.qconfig.label, "seed": config.get("seed"), "model": config.get("model"), **notes}
    tables = {"run": run, "quantizers": result.qconfig.to_dict(), "input": result.spec.to_dict()}
    tables |= _groups(config.get("hyperparameters", {}))
    cells = "".join(
        f"<div><h3>{html.text(_readable(name))}</h3>{html.pairs(_shown(rows))}</div>" for name, rows in tables.items()
    )
    return Html(f'<div class="columns">{cells}</div>')


def _groups(settings: Mapping[str, Any], title: str = "method") -> dict[str, dict[str, Any]]:
    """Nested hyperparameters as one flat table per level; the ideas, a list, become a table of their own."""
    own: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {title: own}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            groups |= _groups(value, name)
        elif name == "ideas":
            groups["ideas"] = {idea["idea"]: _parameters(idea) for idea in value}
        else:
            own[name] = value
    return {name: rows for name, rows in groups.items() if rows}


def _shown(rows: Mapping[str, Any]) -> list[tuple[object, object]]:
    return [(_readable(name), _plain(value)) for name, value in rows.items()]


def _parameters(idea: Mapping[str, Any]) -> str:
    return ", ".join(f"{_readable(name)} {_plain(value)}" for name, value in idea.items() if name != "idea")


def _readable(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: Any) -> str:
    """A configuration's value as people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    return value if isinstance(value, str) else json.dumps(value)
