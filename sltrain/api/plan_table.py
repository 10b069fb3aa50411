"""A memory plan as it is shown: columns of bytes by group, one a way to train, as a table and as plain data."""

from dataclasses import dataclass
from typing import Any

Groups = dict[str, int]  # what bytes are for -> how many


@dataclass(frozen=True)
class Column:
    """One way to train the model: bytes by group."""

    name: str
    groups: Groups
    num_parameters: int
    paper_millions: str | None = None  # as the paper prints num_parameters

    @property
    def total_bytes(self) -> int:
        return sum(self.groups.values())


@dataclass(frozen=True)
class Plan:
    """What `sltrain-plan` shows; the first column is the configuration that was asked for."""

    columns: list[Column]
    cards: dict[str, int]  # name -> bytes that a run may take
    reserve_gb: float  # of each, in 1e9 bytes, that it may not
    headline: str
    notes: list[str]
    measured_bytes: int | None = None

    def fits(self, column: Column) -> dict[str, bool]:
        return {card: column.total_bytes <= usable for card, usable in self.cards.items()}

    @property
    def total_bytes(self) -> int:
        """The most bytes that the run holds at a time, on one process."""
        return self.columns[0].total_bytes

    @property
    def groups(self) -> Groups:
        """What they are for, at that moment."""
        return self.columns[0].groups

    @property
    def table(self) -> str:
        """Markdown for people; groups in which no column has a byte are left out."""
        columns = self.columns
        rows = [["GB (1e9 bytes)", *(column.name for column in columns)]]
        for group in columns[0].groups:
            num_bytes = [column.groups.get(group, 0) for column in columns]
            if any(num_bytes):
                rows.append([group.replace("_", " "), *(f"{number / 1e9:.3f}" for number in num_bytes)])
        rows.append(["total", *(f"{column.total_bytes / 1e9:.3f}" for column in columns)])
        if self.measured_bytes is not None:
            rows.append(["measured here", f"{self.measured_bytes / 1e9:.3f}", *[""] * (len(columns) - 1)])
        rows.append(["parameters", *(f"{c.paper_millions or round(c.num_parameters / 1e6, 1)}M" for c in columns)])
        for card in self.cards:
            rows.append([f"fits {card}", *("yes" if self.fits(column)[card] else "no" for column in columns)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
        lines = [_line([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines.insert(1, _line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]))
        foot = [f"fits CARD: into its GiB less {self.reserve_gb:g} GB (reserve_gb) for driver, libraries and fragments"]
        return "\n".join([self.headline, "", *lines, "", *foot, *(f"note: {note}" for note in self.notes)])

    def as_object(self) -> dict[str, Any]:
        """What format=json prints: the run itself, and the others under `compared`."""
        own, *others = self.columns

        def describe(column: Column) -> dict[str, Any]:
            return {
                "total_bytes": column.total_bytes,
                "groups": column.groups,
                "num_parameters": column.num_parameters,
                "fits": self.fits(column),
            }

        return {
            **describe(own),
            **({} if own.paper_millions is None else {"paper_millions": float(own.paper_millions)}),
            **({} if self.measured_bytes is None else {"measured_bytes": self.measured_bytes}),
            "compared": {column.name: describe(column) for column in others},
        }


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
