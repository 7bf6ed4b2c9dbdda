"""Two results of one suite: which rows became faster or slower by more than the noise of both runs."""

from dataclasses import dataclass
from typing import Any

KEYS = ("op", "case", "dtype", "device", "backend", "pass")
TIMES = ("ms", "ms_p10", "ms_p90")
# What must be equal for times to mean anything beside each other.
MACHINE = ("cpu", "cores", "threads", "torch", "gpu")


@dataclass(frozen=True)
class Change:
    """One row of both runs. ``ratio`` is new time over old; ``verdict`` "faster", "slower", or "" within the noise."""

    keys: tuple[str, ...]
    old_ms: float
    new_ms: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.new_ms / self.old_ms


@dataclass(frozen=True)
class Comparison:
    """All rows that both runs have, how many only one has, and what differs between the machines."""

    changes: list[Change]
    only_old: int
    only_new: int
    machine: list[str]

    def lines(self) -> list[list[str]]:
        """The changes as cells of text, the header first; the largest change first."""
        ordered = sorted(self.changes, key=lambda change: abs(change.ratio - 1), reverse=True)
        table = [[*KEYS, "old ms", "new ms", "new / old", "verdict"]]
        for c in ordered:
            table.append([*c.keys, f"{c.old_ms:.4g}", f"{c.new_ms:.4g}", f"{c.ratio:.2f}", c.verdict])
        return table

    def __str__(self) -> str:
        slower = sum(change.verdict == "slower" for change in self.changes)
        faster = sum(change.verdict == "faster" for change in self.changes)
        words = [f"{len(self.changes)} rows compared: {slower} slower, {faster} faster beyond the noise of both runs"]
        if self.only_old or self.only_new:
            words.append(f"{self.only_old} rows only in the old run, {self.only_new} only in the new one")
        if self.machine:
            words.append(f"the runs are not of one machine: {'; '.join(self.machine)}")
        return "\n".join(words)


def check(result: Any, suite: str) -> None:
    """Refuses what is no result of that suite.

    Raises:
        ValueError: it is none, or of another suite, or its rows have no names or no times.
    """
    if not isinstance(result, dict) or not {"suite", "rows", "environment"} <= result.keys():
        raise ValueError("compare: old must be what zsq bench --json wrote, with suite, environment and rows")
    if result["suite"] != suite:
        raise ValueError(f"compare: old must be of the suite {suite!r}, got {result['suite']!r}")
    for name, kind, called in (("rows", list, "a list"), ("environment", dict, "names and values")):
        if not isinstance(result[name], kind):
            raise ValueError(f"compare: old must hold {name} as {called}, got {type(result[name]).__name__}")
    for n, row in enumerate(result["rows"]):
        for key, kinds in (*((key, str) for key in KEYS), *((key, int | float) for key in TIMES)):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, kinds):
                what = "a name" if kinds is str else "a time"
                raise ValueError(f"compare: old must have {what} as {key} in every row, got {value!r} in row {n}")


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Holds a new result against an old one of the same suite.

    A row changed if nine tenths of its calls lie on one side of nine tenths of the other run's: the new 10th percentile
    above the old 90th, or the reverse.

    Raises:
        ValueError: as `check`.
    """
    check(old, new["suite"])
    before, now = ({tuple(row[key] for key in KEYS): row for row in result["rows"]} for result in (old, new))
    changes = []
    for keys, row in now.items():
        if keys in before:
            changes.append(Change(keys, before[keys]["ms"], row["ms"], _verdict(before[keys], row)))
    differing = [
        f"{key} {old['environment'].get(key)!r} and {new['environment'].get(key)!r}"
        for key in MACHINE
        if _name(old["environment"].get(key)) != _name(new["environment"].get(key))
    ]
    return Comparison(changes, len(before.keys() - now.keys()), len(now.keys() - before.keys()), differing)


def _verdict(before: dict[str, Any], now: dict[str, Any]) -> str:
    if now["ms_p10"] > before["ms_p90"]:
        return "slower"
    return "faster" if now["ms_p90"] < before["ms_p10"] else ""


def _name(value: Any) -> Any:
    """A GPU by its name: its measured bandwidth differs from run to run."""
    return value.get("name") if isinstance(value, dict) else value
