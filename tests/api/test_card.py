"""The metadata of a model card: which data set of the Hub it names."""

import pytest
import yaml

from sltrain.api.card import _metadata
from sltrain.compose import TRAIN, compose_config

MIX = (
    "data.mix={a:{source:c4,weight:1},b:{path:/home/me/*.gz,weight:1},"
    f"c:{{repo:some/text,commit:{'c' * 40},weight:1}}}}"
)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (["data=c4"], ["allenai/c4"]),
        (["data=hf", "repo=some/text", f"data.commit={'c' * 40}"], ["some/text"]),
        (["data=hf", "repo=/home/me/texts"], None),  # a folder, which the Hub would refuse as a name
        (["data=stdlib"], None),
        ([MIX], ["allenai/c4", "some/text"]),
    ],
)
def test_a_card_names_data_sets_of_the_hub_only(data: list[str], named: list[str] | None) -> None:
    config = compose_config(["model=llama_tiny", *data], TRAIN)
    metadata = _metadata(config, "dense", opens_by_code=False, license=None, evaluation={"perplexity": 9.0})
    assert yaml.safe_load(metadata).get("datasets") == named
    (result,) = yaml.safe_load(metadata)["model-index"][0]["results"]
    assert result["dataset"]["type"] == (named[0] if named and len(named) == 1 else config.data.name)
