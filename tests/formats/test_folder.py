"""config.json as transformers reads it, JSON that is damaged, and a card that lacks a fact."""

import json
import math
from pathlib import Path

import huggingface_hub
import jinja2
import pytest
import transformers

from sltrain.formats.folder import card_metadata, llama_config, model_card, read_json, tokenizer_config, write_json

SHAPE = {
    "name": "odd",
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": None,
    "max_position_embeddings": 77,
    "rms_norm_eps": 1e-4,
    "rope_theta": 123.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 9.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 7,
    },
    "tie_word_embeddings": True,
    "initializer_range": 0.5,
}


def test_transformers_reads_the_shape() -> None:
    ids = {"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 6}
    config = transformers.LlamaConfig.from_dict(llama_config(SHAPE, 99, "bfloat16", ids))
    for key in set(SHAPE) - {"name", "vocab_size", "rope_theta", "rope_scaling"}:
        assert getattr(config, key) == SHAPE[key], key
    assert config.vocab_size == 99 and config.head_dim == 8
    assert config.rope_parameters == {"rope_theta": 123.0, **SHAPE["rope_scaling"]}
    unscaled = {**SHAPE, "rope_scaling": {**SHAPE["rope_scaling"], "rope_type": "default"}}
    plain = transformers.LlamaConfig.from_dict(llama_config(unscaled, 99, "bfloat16", ids))
    assert plain.rope_parameters == {"rope_theta": 123.0, "rope_type": "default"}
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (4, 5, 6)
    assert str(config.dtype) == "torch.bfloat16"
    assert config.hidden_act == "silu" and not config.attention_bias and not config.mlp_bias


def test_what_is_not_said_is_not_transformers_default() -> None:
    config = transformers.LlamaConfig.from_dict(
        llama_config({**SHAPE, "num_key_value_heads": None}, 9, "float32", {"eos_token_id": 5})
    )
    assert config.num_key_value_heads == 6
    assert config.bos_token_id is None and config.pad_token_id is None


def test_tokenizer_config_names_the_tokens_there_are() -> None:
    config = tokenizer_config(77, {"eos_token": "</s>"})
    assert config["model_max_length"] == 77 and config["eos_token"] == "</s>"
    assert config["clean_up_tokenization_spaces"] is False and "bos_token" not in config


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"5", b"null", b"\xff\xfe{}"])
def test_damaged_json(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged: ") as caught:
        read_json(file)
    assert str(file) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_json_comes_back(tmp_path: Path) -> None:
    content = {"a": {"b": [1, None, "é"]}, "c": 1e-6}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content == json.loads((tmp_path / "x.json").read_text())
    with pytest.raises(OSError, match="nothing"):
        read_json(tmp_path / "nothing.json")


@pytest.mark.parametrize("perplexity", [None, math.inf, 33.25])
def test_the_metadata_of_a_card_as_the_hub_reads_it(perplexity: float | None) -> None:
    text = card_metadata("llama_60m", "transformers", "apache-2.0", ["allenai/c4"], "allenai/c4", perplexity, ["llama"])
    found = huggingface_hub.ModelCard(f"---\n{text}\n---\n").data
    assert (found.library_name, found.license, found.datasets) == ("transformers", "apache-2.0", ["allenai/c4"])
    assert [(r.dataset_type, r.metric_value) for r in found.eval_results or []] == (
        [("allenai/c4", 33.25)] if perplexity == 33.25 else []
    )


def test_a_card_without_a_fact_is_no_card() -> None:
    with pytest.raises(jinja2.UndefinedError):
        model_card(format="dense", dtype="float32")
