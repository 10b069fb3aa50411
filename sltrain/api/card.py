"""The model card of an export, README.md of its folder: what was trained, how, and what came of it.

At its top is the metadata by which the Hugging Face Hub finds and shows a model: library, tags, data sets, license, and
the validation perplexity as a result.
"""

import re
from collections.abc import Sequence

from sltrain.building.saved import Saved
from sltrain.config import TrainConfig
from sltrain.data.sources.base import SourceConfig
from sltrain.data.sources.mix import Mix
from sltrain.events import Event, published_perplexity
from sltrain.formats.folder import card_metadata, model_card
from sltrain.layers.base import ReplacedLinear
from sltrain.planning.accounting import count_parameters, sum_of_groups
from sltrain.runs.run_record import read_run


def check_license(license: str | None) -> None:
    """Raise ValueError for what cannot be a license's identifier."""
    if license is not None and not re.fullmatch(r"[a-z0-9]+([.+-][a-z0-9]+)*", license):
        raise ValueError(
            f"license {license!r} is no identifier of the Hub, such as apache-2.0, mit, cc-by-4.0, llama3.1 or other"
        )


def card(
    saved: Saved, config: TrainConfig, format: str, dtype: str, without_code: Sequence[str], license: str | None
) -> str:
    """The card of an export of `saved`, a run, in this format and dtype. `without_code`: the kinds of its layers that
    bring no code for transformers, which then cannot open a compressed one."""
    layers = [module for module in saved.model.modules() if isinstance(module, ReplacedLinear)]
    parts = dict.fromkeys(name for layer in layers if layer.is_mergeable for name in layer.parts())
    counts = count_parameters(saved.model)
    evaluation = _evaluation(saved)
    return model_card(
        metadata=_metadata(config, format, not without_code, license, evaluation),
        config=config,
        format=format,
        code=[f"layer_{kind}.py" for kind in sorted({layer.kind for layer in layers if layer.CODE is not None})],
        without_code=without_code,
        can_merge=all(layer.is_mergeable for layer in layers),
        dtype=dtype,
        step=saved.step,
        progress=saved.progress,
        parameters=f"{counts['total']:,}",
        groups=sum_of_groups(counts, "{:,}".format),
        parts=[{"BA": "(alpha / rank) B A"}.get(name, name) for name in parts],
        tensors={name: group for layer in layers for name, group in layer.GROUPS.items()},
        settings=list(dict.fromkeys(key for layer in layers for key in layer.settings())),
        evaluation=evaluation,
        published=None if evaluation is None else published_perplexity(evaluation),
    )


def _evaluation(saved: Saved) -> Event | None:
    """The run's own evaluation at the exported step, the newest if there are several."""
    record = read_run(saved.path)
    evaluations = [line for line in [*record.evals, record.final] if line and line["step"] == saved.step]
    return evaluations[-1] if evaluations else None


def _data_sets(data: SourceConfig) -> list[str]:
    """The data sets of the Hub that are read; a folder's name is nobody's concern."""
    sources = [entry.source for entry in data.entries.values()] if isinstance(data, Mix) else [data]
    repos = [(getattr(source, "repo", None), source) for source in sources]
    return list(dict.fromkeys(repo for repo, source in repos if repo and getattr(source, "commit", repo) is not None))


def _metadata(
    config: TrainConfig, format: str, opens_by_code: bool, license: str | None, evaluation: Event | None
) -> str:
    datasets = _data_sets(config.data)
    is_custom = format == "compressed" and opens_by_code
    return card_metadata(
        config.model.name,
        library="sltrain" if format == "compressed" and not opens_by_code else "transformers",
        license=license,
        datasets=datasets,
        corpus=datasets[0] if len(datasets) == 1 and config.data.name != "mix" else config.data.name,
        perplexity=None if evaluation is None else evaluation.get("perplexity"),
        tags=list(dict.fromkeys(["llama", "sltrain", config.method.name, "pretraining"])) + ["custom_code"] * is_custom,
    )
