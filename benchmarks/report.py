"""The GPU report as data and as a page: saved after every section, so that a killed run keeps what it measured."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Entry", "Report"]

DONE, FAILED, SKIPPED = "done", "failed", "skipped"


@dataclass(frozen=True, slots=True)
class Entry:
    """A section's outcome: `status` is done, failed or skipped; `reason` says why where it is not done."""

    name: str
    title: str
    status: str
    seconds: float
    reason: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)


class Report:
    """Entries in the order they came, on disk as report.json and report.md in `out`."""

    def __init__(self, out: Path, name: str, machine: Mapping[str, Any]) -> None:
        self.out, self.name, self.machine = out, name, machine
        self.entries: list[Entry] = []

    @property
    def failed(self) -> bool:
        return any(entry.status == FAILED for entry in self.entries)

    def add(self, entry: Entry) -> None:
        """Append and save."""
        self.entries.append(entry)
        self.save()

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        _replace(self.out / "report.json", json.dumps(self.as_dict(), indent=1, default=str) + "\n")
        _replace(self.out / "report.md", self.as_markdown())

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "machine": self.machine, "sections": [asdict(entry) for entry in self.entries]}

    def as_markdown(self) -> str:
        parts = [f"# {self.name}", _table([_summary(entry) for entry in self.entries])]
        for entry in self.entries:
            parts.append(f"## {entry.title}")
            if entry.reason:
                parts.append(f"**{entry.status}**: {entry.reason.splitlines()[0]}")
            if entry.status == FAILED and "\n" in entry.reason:
                parts.append(_block(entry.reason))
            parts += _facts(entry.result)
        return "\n\n".join(parts) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old report or the new one, never half of one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _summary(entry: Entry) -> dict[str, Any]:
    said = entry.result.get("headline") or (entry.reason.splitlines() or [""])[0]
    return {"section": entry.name, "status": entry.status, "seconds": round(entry.seconds, 1), "in short": said}


def _facts(result: Mapping[str, Any]) -> list[str]:
    """Markdown paragraphs of a section's result: sentence, facts, then tables and blocks under their names."""
    parts = [str(result["headline"])] if "headline" in result else []
    rest = {key: value for key, value in result.items() if key != "headline"}
    plain = {key: value for key, value in rest.items() if not _is_list(value)}
    if plain:
        parts.append("\n".join(f"- {key}: {_cell(value)}" for key, value in plain.items()))
    for key, value in rest.items():
        if not _is_list(value) or not value:
            continue
        parts.append(f"**{key}**")
        parts.append(_table(value) if isinstance(value[0], Mapping) else _block("\n".join(map(str, value))))
    return parts


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def _block(text: str) -> str:
    return f"````\n{text.rstrip()}\n````"
