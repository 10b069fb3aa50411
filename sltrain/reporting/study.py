"""What a study says: each candidate at its own best setting, and paired differences to the reference, in Markdown.

The page is drawn from the lines of a ledger alone (api/ledger.py). Losses are nats a token; one that diverged is
infinite. Setting and number come from different text and seeds: the lowest mean loss of the tuning runs, on half a of
the validation documents, chooses, after a screening among its finalists; the reporting runs, on half b, say how good it
is.

The view at equal time asks what a candidate had reached when the reference finished: seconds an update, the median of
its reporting runs, give the update at that time; between two evaluations the loss is interpolated. A candidate that had
finished before keeps its last loss, and of one that had not the learning rate was still high.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sltrain.reporting.drawing import Picture
from sltrain.reporting.paired import Difference, paired_difference
from sltrain.reporting.table import Table, markdown, perplexity, short

TOLERANCE = 0.02  # relative, of parameters and FLOPs that are to be equal: shapes come in whole numbers
TIME_TOLERANCE = 0.05  # the same of time, which is known after the runs


@dataclass(frozen=True)
class Entry:
    """One run, as a line of the ledger has it. None: not known."""

    role: str  # screening, tuning or reporting
    candidate: str
    trial: int  # the number of its setting, from 1
    setting: dict[str, Any]
    seed: int
    loss: float  # of the validation text; infinite if it diverged
    updates: int  # done
    tokens: int | None = None  # trained on, pads left out
    num_parameters: int | None = None
    flops_per_token: float | None = None  # forward and backward
    seconds_per_update: float | None = None  # median, outside evaluation and saving
    seconds: float | None = None  # of the whole process
    evals: list[list[float]] = field(default_factory=list)  # update, loss
    eval_tokens: int | None = None
    eval_bytes: int | None = None
    config: dict[str, Any] = field(default_factory=dict)  # this and the following: what the number depends on
    code: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What it is in the study."""
        return self.role, self.candidate, self.trial, self.seed


@dataclass(frozen=True)
class Protocol:
    """The part of a study that the page needs."""

    name: str
    reference: str
    trials: int
    tuning_seeds: list[int]
    reporting_seeds: list[int]
    common: list[str]
    candidates: dict[str, dict[str, Any]]  # name -> overrides, tune, equal, seen
    screening: list[str] = field(default_factory=list)  # overrides of a shorter look at every trial; none: no such look
    finalists: int | None = None  # trials of each candidate that are made in whole after it; None: all


def tuned(protocol: Protocol, entries: Iterable[Entry], candidate: str, role: str = "tuning") -> dict[int, float]:
    """The mean loss of each trial of a candidate in this role, of which all tuning seeds are done."""
    losses: dict[int, dict[int, float]] = {}
    for entry in entries:
        if entry.role == role and entry.candidate == candidate and entry.seed in protocol.tuning_seeds:
            losses.setdefault(entry.trial, {})[entry.seed] = entry.loss
    done = {trial: own for trial, own in losses.items() if len(own) == len(protocol.tuning_seeds)}
    return {trial: sum(own.values()) / len(own) for trial, own in sorted(done.items())}


def finalists(protocol: Protocol, entries: Sequence[Entry], candidate: str) -> list[int]:
    """The trials that are made in whole: all, or the best of the screening; none until that is done."""
    if not protocol.screening:
        return list(range(1, protocol.trials + 1))
    losses = tuned(protocol, entries, candidate, "screening")
    best = sorted(losses, key=lambda trial: (losses[trial], trial))[: protocol.finalists]
    return sorted(best) if len(losses) == protocol.trials else []


def chosen_trial(protocol: Protocol, entries: Sequence[Entry], candidate: str) -> int | None:
    """The trial with the lowest mean loss, of equal ones the first; None until all are done."""
    losses, wanted = tuned(protocol, entries, candidate), finalists(protocol, entries, candidate)
    is_done = bool(wanted) and losses.keys() >= {*wanted}
    return min(wanted, key=lambda trial: (losses[trial], trial)) if is_done else None


class Results:
    """The reporting runs of a study by candidate, those of them that are complete."""

    def __init__(self, protocol: Protocol, entries: Sequence[Entry]) -> None:
        self.protocol, self.entries = protocol, entries
        self.chosen = {name: chosen_trial(protocol, entries, name) for name in protocol.candidates}
        self.runs: dict[str, list[Entry]] = {}
        for name, trial in self.chosen.items():
            own = {e.seed: e for e in entries if (e.role, e.candidate, e.trial) == ("reporting", name, trial)}
            if all(seed in own for seed in protocol.reporting_seeds):
                self.runs[name] = [own[seed] for seed in protocol.reporting_seeds]

    def losses(self, name: str) -> list[float]:
        """By seed."""
        return [entry.loss for entry in self.runs[name]]

    def setting(self, name: str) -> dict[str, Any]:
        """The chosen one."""
        return self.runs[name][0].setting

    def median(self, name: str, key: str) -> float | None:
        """Of a field of the reporting runs, those left out that diverged before their last update."""
        runs = [entry for entry in self.runs[name] if math.isfinite(entry.loss)]
        values = [value for entry in runs if (value := getattr(entry, key)) is not None]
        return statistics.median(values) if values else None

    def tokens(self, name: str) -> float | None:
        """Trained on, those that its first weights had seen included."""
        own = self.median(name, "tokens")
        return None if own is None else own + self.seen(name)

    def seen(self, name: str) -> int:
        """Positions that its first weights had been trained on."""
        starts = self.runs[name][0].config.get("init_from")
        return self.protocol.candidates[name].get("seen", 0) if starts else 0

    def against(self, name: str, other: str) -> Difference:
        """The paired difference of two candidates."""
        return paired_difference(self.losses(name), self.losses(other))

    def time(self, name: str) -> float | None:
        """Seconds of all updates, those for evaluation and saving left out."""
        seconds, updates = self.median(name, "seconds_per_update"), self.median(name, "updates")
        return seconds * updates if seconds and updates else None

    def share_of_time(self, name: str) -> float | None:
        """The time in which the reference finished over that which the candidate takes for all its updates."""
        of_reference, own = self.time(self.protocol.reference), self.time(name)
        return of_reference / own if of_reference and own else None

    def at_equal_time(self, name: str) -> Difference | None:
        """The paired difference to the reference when that finished; None if no evaluation says it."""
        share = self.share_of_time(name)
        losses = [None if share is None else loss_at(entry, share * entry.updates) for entry in self.runs[name]]
        known = [loss for loss in losses if loss is not None]
        if len(known) < len(losses):
            return None
        return paired_difference(known, self.losses(self.protocol.reference))


def loss_at(entry: Entry, update: float) -> float | None:
    """The validation loss of a run after so many updates, interpolated; None before its first evaluation."""
    if not math.isfinite(entry.loss) or update >= entry.updates:
        return entry.loss
    points = sorted({**{int(step): loss for step, loss in entry.evals}, entry.updates: entry.loss}.items())
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if before <= update <= after:
            return low + (high - low) * (update - before) / (after - before)
    return None


# ---- the page


def render(results: Results, notes: Sequence[str], command: str, picture: Picture | None = None) -> str:
    """The page of a study, finished or not, in Markdown. The picture lies beside it."""
    protocol, entries = results.protocol, results.entries
    parts = [f"# Study {protocol.name}", _how(protocol)]
    if protocol.reference in results.runs:
        table = main_table(results)
        parts += [markdown(table), table.legend]
        if picture is not None:
            parts += [f"![{picture.alt}]({picture.file_name})", picture.caption]
        if len(results.runs) > 2:
            parts += ["## Row over column", markdown(pairs_table(results)), "Ratios of perplexities, as above."]
    else:
        parts.append(f"The reporting runs of {protocol.reference}, the reference, are not done yet.")
    if results.runs:
        parts += ["## Perplexity of each seed", markdown(seeds_table(results))]
    parts += ["## Trials", "Perplexity on half a, over tuning seeds.", markdown(trials_table(results))]
    if (borrowed := borrowed_table(results)).rows:
        parts += [f"### At the setting of {protocol.reference}", markdown(borrowed), borrowed.legend]
    remarks = [*remarks_on(results), *notes]
    if remarks:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in remarks)]
    parts += ["## How this page was made", f"```\n{command}\n```", _origins(entries)]
    return "\n\n".join(parts) + "\n"


def _how(protocol: Protocol) -> str:
    screening = (
        f" (all with `{' '.join(protocol.screening)}`, then the best {protocol.finalists} in whole)"
        if protocol.screening
        else ""
    )
    return (
        f"{len(protocol.candidates)} candidates. Each was tuned by {counted(protocol.trials, 'trial')} with seeds"
        f" {_listed(protocol.tuning_seeds)}, judged on half a of the validation documents{screening}, and reported with"
        f" seeds {_listed(protocol.reporting_seeds)} on half b. Runs of one seed read the same rows in the same order."
        f" All runs: `{' '.join(protocol.common)}`."
    )


def main_table(results: Results) -> Table:
    """A row for each candidate whose reporting runs are done, the reference first."""
    reference = results.protocol.reference
    rows = []
    for name in sorted(results.runs, key=lambda name: name != reference):
        is_reference = name == reference
        share, timed = results.share_of_time(name), results.at_equal_time(name)
        seconds, flops = results.median(name, "seconds_per_update"), results.median(name, "flops_per_token")
        rows.append(
            [
                name,
                setting_text(results.setting(name)),
                perplexity(_exp(sum(results.losses(name)) / len(results.losses(name)))),
                "1" if is_reference else ratio_text(results.against(name, reference)),
                "0" if is_reference else difference_text(results.against(name, reference)),
                _number(results.median(name, "num_parameters")),
                "-" if flops is None else f"{flops / 1e6:.3g}M",
                _number(results.tokens(name)),
                "-" if seconds is None else f"{seconds:.3g}",
                "1" if is_reference else "-" if timed is None else ratio_text(timed),
                "-" if share is None else f"{min(share, 1):.0%}",
            ]
        )
    headings = ["candidate", "its setting", "perplexity", f"over {reference}", "difference of log perplexity"]
    headings += ["parameters", "FLOPs a token", "tokens", "s an update", "at equal time", "of its updates by then"]
    legend = (
        "Perplexity is exp of the mean log perplexity over seeds. In brackets the 95 % interval of Student's paired t"
        f" over {len(results.protocol.reporting_seeds)} seeds, each pair of candidates by itself: of many pairs some"
        f" intervals miss. At equal time: when {reference} had finished, by seconds an update, the median of each"
        " candidate's reporting runs. On a machine that others use such times say little; `sltrain-bench what=step`"
        " measures in turn."
    )
    return Table(headings, rows, headings[:2], legend)


def pairs_table(results: Results) -> Table:
    """The ratio of perplexities of every pair."""
    names = list(results.runs)
    rows = [
        [name, *("1" if other == name else ratio_text(results.against(name, other)) for other in names)]
        for name in names
    ]
    return Table(["candidate", *names], rows, ["candidate"])


def seeds_table(results: Results) -> Table:
    """The perplexity of each reporting run."""
    rows = [[name, *(perplexity(_exp(loss)) for loss in results.losses(name))] for name in results.runs]
    return Table(["candidate", *(f"seed {seed}" for seed in results.protocol.reporting_seeds)], rows, ["candidate"])


def trials_table(results: Results) -> Table:
    """Every trial that is done, of a screening too, and which was chosen."""
    rows, is_screened = [], bool(results.protocol.screening)
    for name in results.protocol.candidates:
        settings = {e.trial: e.setting for e in results.entries if e.role != "reporting" and e.candidate == name}
        short, whole = (tuned(results.protocol, results.entries, name, role) for role in ("screening", "tuning"))
        for trial in sorted(short.keys() | whole.keys()):
            losses = [short, whole] if is_screened else [whole]
            numbers = [perplexity(_exp(own[trial])) if trial in own else "" for own in losses]
            mark = "chosen" if trial == results.chosen[name] else ""
            rows.append([name, setting_text(settings[trial]), *numbers, mark])
    headings = ["candidate", "setting", *["screening"] * is_screened, "perplexity", ""]
    return Table(headings, rows, ["candidate", "setting", ""])


def borrowed_table(results: Results) -> Table:
    """What each candidate loses with the reference's chosen values of the keys that both tune, by its trials."""
    reference = results.protocol.reference
    settings = {(e.candidate, e.trial): e.setting for e in results.entries if e.role == "tuning"}
    of_reference = settings.get((reference, results.chosen.get(reference) or 0), {})
    rows = []
    for name, chosen in results.chosen.items():
        own = settings.get((name, chosen or 0), {})
        shared = {key: value for key, value in of_reference.items() if key in own}
        if name == reference or not shared:
            continue
        losses = tuned(results.protocol, results.entries, name)
        there = [loss for trial, loss in losses.items() if shared.items() <= settings[name, trial].items()]
        best, borrowed = losses[chosen or 0], min(there, default=math.nan)
        lost = f"{100 * (_exp(borrowed - best) - 1):+.1f} %" if math.isfinite(borrowed - best) else "-"
        loss = perplexity(_exp(borrowed)) if there else "not tried"
        rows.append([name, setting_text(shared), setting_text(own), loss, perplexity(_exp(best)), lost])
    headings = ["candidate", "values of the reference", "its own setting", "perplexity there", "at its own", "more"]
    legend = (
        f"With the values chosen for {reference}, of the keys that both tune, over its own best setting; other keys are"
        " at their best. On half a, over tuning seeds: there is no interval."
    )
    return Table(headings, rows, headings[:3], legend)


def remarks_on(results: Results) -> list[str]:
    """What a reader must know before believing the table."""
    remarks = []
    for name, runs in results.runs.items():
        if (count := sum(math.isinf(run.loss) for run in runs)) > 0:
            remarks.append(f"{name}: {count} of {len(runs)} runs diverged and count as infinite.")
        remarks += _edges(results, name)
        remarks += _starts(results, name)
        remarks += _unequal(results, name)
    for seed in results.protocol.reporting_seeds:
        reporting = [e for e in results.entries if e.role == "reporting" and e.seed == seed and math.isfinite(e.loss)]
        if len({(e.eval_tokens, e.eval_bytes) for e in reporting}) > 1:
            remarks.append(f"Seed {seed}: the candidates were judged on different text; the study says nothing.")
        if len({(e.updates, e.tokens) for e in reporting}) > len({e.updates for e in reporting}):
            remarks.append(f"Seed {seed}: candidates with as many updates trained on different numbers of tokens.")
    machines, codes = ({getattr(entry, key) for entry in results.entries} for key in ("machine", "code"))
    for what, values in (("machine", machines), ("version", codes)):
        if len(values) > 1:
            remarks.append(f"The runs were made by more than one {what}: {'; '.join(sorted(values))}.")
    return remarks


def _edges(results: Results, name: str) -> list[str]:
    """Where the best setting lies at the end of the values that were tried: a better one may lie beyond. Of two values
    one always is."""
    tune = results.protocol.candidates[name]["tune"]
    edges = []
    for key, value in results.setting(name).items():
        numbers = [one for one in tune.get(key, []) if isinstance(one, int | float) and not isinstance(one, bool)]
        if len(numbers) > 2 and value in (min(numbers), max(numbers)):
            edges.append(f"{key}={value} is the {'lowest' if value == min(numbers) else 'highest'}")
    return [f"{name}: {' and '.join(edges)} of the values tried; a better one may lie beyond."] if edges else []


def _starts(results: Results, name: str) -> list[str]:
    """Whether its first weights had been trained, and are not those of all."""
    remarks, of = [], {one: runs[0].config for one, runs in results.runs.items()}
    for key in ("init_from", "support_from"):
        start = of[name].get(key)
        if not start or len({config.get(key) for config in of.values()}) == 1:
            continue
        seen = f"its tokens count {short(results.seen(name))} positions behind it"
        if key == "support_from":
            seen = "its tokens count none of those that the other run was trained on"
        remarks.append(f"{name} has {key}={start}: {seen}, its FLOPs and time none.")
    return remarks


def _unequal(results: Results, name: str) -> list[str]:
    """What a candidate says it has as much of as another, and has not."""
    remarks = []
    for quantity, other in results.protocol.candidates[name]["equal"].items():
        if other not in results.runs:
            continue
        own, others = (_quantity(results, one, quantity) for one in (name, other))
        tolerance = TIME_TOLERANCE if quantity == "time" else TOLERANCE
        if own and others and abs(own / others - 1) > tolerance:
            remarks.append(f"{name} was to have the {quantity} of {other} and has {own / others:.3f} times that.")
    return remarks


def _quantity(results: Results, name: str, quantity: str) -> float | None:
    if quantity == "time":
        return results.time(name)
    if quantity == "flops":
        flops, tokens = results.median(name, "flops_per_token"), results.median(name, "tokens")
        return flops * tokens if flops and tokens else None
    return results.tokens(name) if quantity == "tokens" else results.median(name, "num_parameters")


def _origins(entries: Sequence[Entry]) -> str:
    """What the numbers depend on."""
    machines, codes = sorted({e.machine for e in entries}), sorted({e.code for e in entries})
    versions = sorted({", ".join(f"{name} {version}" for name, version in e.versions.items()) for e in entries})
    hours = sum(e.seconds or 0 for e in entries) / 3600
    return (
        f"{len(entries)} runs, {hours:.2f} hours, on {'; '.join(machines)}; {'; '.join(versions)}; sltrain"
        f" {', '.join(codes)}. Configuration, seed and numbers of every run: `ledger.jsonl`."
    )


def setting_text(setting: Mapping[str, Any]) -> str:
    """As it is typed."""
    return " ".join(f"{key}={value}" for key, value in setting.items()) or "-"


def ratio_text(difference: Difference) -> str:
    """0.973 (0.951 to 0.996); of means that are no number, who diverged."""
    if math.isnan(difference.mean) or difference.mean == -math.inf:
        return "both diverged" if math.isnan(difference.mean) else "the other diverged"
    low, high = difference.interval
    text = f"{difference.ratio:.3f}"
    return f"{text} ({low:.3f} to {high:.3f})" if math.isfinite(low) and math.isfinite(high) else text


def difference_text(difference: Difference) -> str:
    """-0.0274 ± 0.0231."""
    if math.isfinite(difference.half_width):
        return f"{difference.mean:+.4f} ± {difference.half_width:.4f}"
    return f"{difference.mean:+.4f}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _number(value: float | None) -> str:
    return "-" if value is None else short(value)


def counted(number: int, noun: str) -> str:
    """1 trial, 2 trials."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
