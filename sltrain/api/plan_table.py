"""A memory plan as it is shown: columns of bytes by group, one a way to train, as a table and as plain data."""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

Groups = dict[str, int]  # what bytes are for -> how many
MAX_COLUMNS = 6  # beside each other; more are shown below


@dataclass(frozen=True)
class Column:
    """One way to train the model: bytes by group."""

    names: tuple[str, ...]  # what it is, in one or several lines
    groups: Groups
    num_parameters: int
    paper_millions: str | None = None  # as the paper prints num_parameters

    @property
    def name(self) -> str:
        return " ".join(self.names)

    @property
    def total_bytes(self) -> int:
        return sum(self.groups.values())


@dataclass(frozen=True)
class Plan:
    """What `sltrain-plan` shows; the first column is the configuration that was asked for, or the first of several."""

    columns: list[Column]
    cards: dict[str, int]  # name -> bytes that a run may take
    reserve_gb: float  # of each, in 1e9 bytes, that it may not
    headline: str
    notes: list[str]
    measured_bytes: int | None = None
    traffic: dict[str, float] | None = None  # bytes that a process sends in an update, and seconds, of the run itself

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
        tables = [self.columns[i : i + MAX_COLUMNS] for i in range(0, len(self.columns), MAX_COLUMNS)]
        lines = [line for columns in tables for line in ["", *_markdown(self._rows(columns))]]
        foot = [f"fits CARD: into its GiB less {self.reserve_gb:g} GB (reserve_gb) for driver, libraries and fragments"]
        return "\n".join([self.headline, *lines, "", *foot, *(f"note: {note}" for note in self.notes)])

    def _rows(self, columns: list[Column]) -> list[list[str]]:
        """The cells of these columns, with a first one that says what they are; the first row is the head."""
        first, *more = zip_longest(*(column.names for column in columns), fillvalue="")
        rows = [["GB (1e9 bytes)", *first], *(["", *names] for names in more)]
        for group in self._groups_shown():
            numbers = (column.groups.get(group) for column in columns)
            cells = ("" if number is None else f"{number / 1e9:.3f}" for number in numbers)
            rows.append([group.replace("_", " "), *cells])
        rows.append(["total", *(f"{column.total_bytes / 1e9:.3f}" for column in columns)])
        if self.measured_bytes is not None:
            rows.append(["measured here", f"{self.measured_bytes / 1e9:.3f}", *[""] * (len(columns) - 1)])
        rows.append(["parameters", *(f"{c.paper_millions or round(c.num_parameters / 1e6, 1)}M" for c in columns)])
        for card in self.cards:
            rows.append([f"fits {card}", *("yes" if self.fits(column)[card] else "no" for column in columns)])
        return rows

    def _groups_shown(self) -> list[str]:
        """The groups of all columns in which there are bytes; those that only some have come before the optimizer's."""
        shared, *others = (column.groups for column in self.columns)
        extra = dict.fromkeys(group for groups in others for group in groups if group not in shared)
        place = list(shared).index("optimizer_state")
        groups = [*list(shared)[:place], *extra, *list(shared)[place:]]
        return [group for group in groups if any(column.groups.get(group) for column in self.columns)]

    def as_object(self) -> dict[str, Any]:
        """What format=json prints: the run itself, and the others under `compared`."""
        own, *others = self.columns

        def describe(column: Column) -> dict[str, Any]:
            return {
                "name": column.name,
                "total_bytes": column.total_bytes,
                "groups": column.groups,
                "num_parameters": column.num_parameters,
                "fits": self.fits(column),
            }

        return {
            **describe(own),
            **({} if own.paper_millions is None else {"paper_millions": float(own.paper_millions)}),
            **({} if self.measured_bytes is None else {"measured_bytes": self.measured_bytes}),
            **({} if self.traffic is None else {"traffic": self.traffic}),
            "compared": {column.name: describe(column) for column in others},
        }


def _markdown(rows: list[list[str]]) -> list[str]:
    """The lines of a table: the first cells to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [_line([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, _line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
