"""The keys of `sltrain-plan` and the cards it knows."""

from dataclasses import fields

import pytest

from sltrain.api.plan_config import CARDS, PLAN, PlanConfig, card_bytes, card_name
from sltrain.compose import compose_config, conf_dir

GIB = 2**30


def settings(*overrides: str) -> PlanConfig:
    return compose_config(list(overrides), PLAN)


def test_conf_sets_every_key() -> None:
    lines = (conf_dir() / "plan.yaml").read_text().splitlines()
    keys = [line.partition(":")[0] for line in lines if line and not line.startswith("#")]
    assert keys == [item.name for item in fields(PlanConfig)]
    defaults = settings()
    assert defaults.format == "table" and not defaults.measure and not defaults.paper_convention
    assert [card_bytes(card) for card in defaults.cards] == [size * GIB for size in (12, 16, 24, 40, 80)]


@pytest.mark.parametrize(
    ("card", "gib", "name"),
    [
        (24, 24, "24GB"),
        (1.5, 1.5, "1.5GB"),
        ("24", 24, "24GB"),
        ("24GB", 24, "24GB"),
        ("24gb", 24, "24GB"),
        ("24GiB", 24, "24GB"),
        ("24g", None, ""),
        ("h100", 79.6, "h100"),
        ("H100", 79.6, "h100"),
        ("rtx4090", 24, "rtx4090"),
        ("a100_80gb", 80, "a100_80gb"),
        ("RTX3060", 12, "rtx3060"),
        (0, None, ""),
        (-24, None, ""),
        ("0GB", None, ""),
        ("1e3", None, ""),
        ("24 GB", None, ""),
        ("h1000", None, ""),
        ("", None, ""),
        (None, None, ""),
        (True, None, ""),
        (float("inf"), None, ""),
        (float("nan"), None, ""),
        ([24], None, ""),
    ],
)
def test_cards(card: object, gib: float | None, name: str) -> None:
    if gib is None:
        with pytest.raises(ValueError, match=r"cards: .*unknown.*cards=\[24\].*h100"):
            card_bytes(card)
        return
    assert card_bytes(card) == int(gib * GIB)
    assert card_name(card) == name


def test_sizes_in_names_are_true() -> None:
    assert all(4 <= size <= 300 and name == name.lower() for name, size in CARDS.items())
    sized = {name: int(name.rpartition("_")[2].removesuffix("gb")) for name in CARDS if name.endswith("gb")}
    assert len(sized) == 2 and all(0.95 * size < CARDS[name] <= size for name, size in sized.items())
    for name in CARDS:
        assert card_name(name) == name and card_bytes(name) == int(CARDS[name] * GIB)


# override -> words the message must hold
BAD: dict[str, list[str]] = {
    "format=yaml": ["format=yaml", "table", "json"],
    "format=JSON": ["format=JSON", "json"],
    "cards=[]": ["cards=[]", "cards=[24]"],
    "cards=[24,foo]": ["foo", "GiB", "rtx4090"],
    "reserve_gb=-1": ["reserve_gb=-1", "0 or more"],
    "reserve_gb=inf": ["reserve_gb=inf"],
    "reserve_gb=nan": ["reserve_gb=nan"],
    "reserve_gb=much": ["reserve_gb=much"],
    "num_processes=0": ["num_processes=0", "at least 1"],
    "num_processes=-2": ["num_processes=-2", "at least 1"],
    "num_processes=1.5": ["num_processes=1.5"],
    "measure=maybe": ["measure=maybe"],
    "measure=true paper_convention=true": ["measure=true", "paper_convention=true", "drop one"],
    "measure=true num_processes=2": ["measure=true", "num_processes"],
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_settings(overrides: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings(*overrides.split())
    assert len(str(caught.value).splitlines()) == 1
    for word in BAD[overrides]:
        assert word in str(caught.value)


def test_good_settings_are_kept() -> None:
    config = settings("cards=[h100,rtx4090,1.5]", "reserve_gb=0", "num_processes=8", "format=json", "measure=false")
    assert config.cards == ["h100", "rtx4090", 1.5]
    assert (config.reserve_gb, config.num_processes, config.format) == (0.0, 8, "json")
    assert settings("paper_convention=true").paper_convention and settings("measure=true").measure
