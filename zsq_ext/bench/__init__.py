"""Measuring: suites of rows, each with what the machine allows and what others take, from the same run."""

import importlib
import json
from pathlib import Path
from typing import Any

from zsq_ext.bench.timing import environment, limits
from zsq_ext.core.progress import QUIET, Progress

# suite -> "module:function". The function takes a Progress and the suite's options, and returns rows as `timing.row`
# makes them.
SUITES = {
    "families": "zsq_ext.bench.families:rows",
    "steps": "zsq_ext.bench.steps:rows",
    "generator": "zsq_ext.bench.generator:rows",
}


def run(suite: str, progress: Progress = QUIET, **options: Any) -> dict[str, Any]:
    """Runs one suite.

    Args:
        suite: a key of `SUITES`.
        progress: where to report.
        options: what the suite takes besides: `families` takes `only`, `inductor` and `seconds`.

    Returns:
        {"suite", "environment", "rows"}, ready for JSON.

    Raises:
        ValueError: no suite has that name, or it does not take an option.
    """
    if suite not in SUITES:
        raise ValueError(f"bench: suite must be one of {', '.join(SUITES)}, got {suite!r}")
    module, _, function = SUITES[suite].partition(":")
    given = {name: value for name, value in options.items() if value}
    if given and suite != "families":
        raise ValueError(f"bench: {', '.join(given)} must be left out with the suite {suite!r}")
    rows = getattr(importlib.import_module(module), function)(progress, **given)
    return {"suite": suite, "environment": {**environment(), "limits": limits()}, "rows": rows}


_LEGEND = """\
ms: a call's median; p10-p90: its 10th and 90th percentile.
% of floor: the time that a copy of as many bytes takes, or the matrix products at the measured rate, over ours.
times as fast as: a peer's time over ours, so above 1 ours is the faster; peers ran in turns with ours."""
_LEGEND_OF_STEPS = "outside convolutions: the share of the step's time that is in neither convolutions nor products."


def legend(result: dict[str, Any]) -> str:
    """What the columns of `lines` mean."""
    return f"{_LEGEND}\n{_LEGEND_OF_STEPS}" if _whole_steps(result) else _LEGEND


def _whole_steps(result: dict[str, Any]) -> bool:
    return any("outside_convolutions" in row for row in result["rows"])


def save(result: dict[str, Any], path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def lines(result: dict[str, Any]) -> list[list[str]]:
    """The rows as cells of text, the header first; the last column says how many times as fast as each peer."""
    header = ["op", "case", "dtype", "device", "backend", "pass", "ms", "p10-p90", "% of floor"]
    whole_steps = _whole_steps(result)
    table = [[*header, *(["outside convolutions"] if whole_steps else []), "times as fast as"]]
    for r in result["rows"]:
        floor = "" if r["pct_of_floor"] is None else f"{r['pct_of_floor']:.0f}"
        peers = ", ".join(f"{name} {ms / r['ms']:.2f}x" for name, ms in r["peers"].items())
        spread = f"{r['ms_p10']:.4g}-{r['ms_p90']:.4g}"
        names = [r[key] for key in ("op", "case", "dtype", "device", "backend", "pass")]
        outside = [f"{100 * r['outside_convolutions']:.0f} %"] if whole_steps else []
        table.append([*names, f"{r['ms']:.4g}", spread, floor, *outside, peers])
    return table
