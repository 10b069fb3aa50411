"""The files beside the weights of an exported folder: configuration, tokenizer, generation settings, model card.

    config.json              transformers' LlamaConfig; under the key "sltrain" what else sltrain needs
    generation_config.json   greedy decoding and the end-of-text token
    tokenizer.json           the run's, without a truncation or padding of its own
    tokenizer_config.json    how transformers reads it; padding on the left, so that batches of prompts can be continued
    README.md                the model card: what was trained, how, and the result
    modeling_sltrain.py      compressed: the model as transformers opens it, which config.json names under "auto_map"
    layer_KIND.py            compressed: a kind of layer that the former does not hold itself; it imports this file

A compressed folder has its own model_type, so that transformers opens it by that file or not at all. Where a kind of
layer brings no such code, the folder goes without: sltrain alone opens it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

DENSE, COMPRESSED = "llama", "sltrain_llama"  # model_type
FORMAT_VERSION = 3  # since 2, layers name their kind; since 3, a compressed folder's weights are model.safetensors
READABLE_VERSIONS = (1, 2, 3)
CARD = Path(__file__).with_name("model_card.md.j2")
CODE = Path(__file__).with_name("modeling_sltrain.py")
CODE_KINDS = {"sltrain", "low_rank"}  # of layers that this file holds itself
AUTO_MAP = {
    "AutoConfig": f"{CODE.stem}.SLTrainLlamaConfig",
    "AutoModelForCausalLM": f"{CODE.stem}.SLTrainLlamaForCausalLM",
}


@dataclass
class Facts:
    """The content of config.json under the key "sltrain"."""

    format_version: int
    format: str  # dense or compressed
    model: str  # its name
    method: str
    seq_len: int  # tokens per row in training
    padding: str
    step: int  # updates
    layers: dict[str, Any] = field(default_factory=dict)  # compressed: the settings of each layer, for `restore_layers`
    attention: str = "full"  # as in training
    tensors: dict[str, Any] = field(default_factory=dict)  # compressed: `tensor_sizes`, for modeling_sltrain.py


def llama_config(shape: dict[str, Any], vocab_size: int, dtype: str, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a dense model, from the fields of config.ModelConfig and those of bos_token_id, eos_token_id and
    pad_token_id that exist."""
    heads, scaling = shape["num_attention_heads"], shape["rope_scaling"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": DENSE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": shape["hidden_size"] // heads,
        "hidden_act": "silu",
        "hidden_size": shape["hidden_size"],
        "initializer_range": shape["initializer_range"],
        "intermediate_size": shape["intermediate_size"],
        "max_position_embeddings": shape["max_position_embeddings"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": shape["num_hidden_layers"],
        "num_key_value_heads": shape["num_key_value_heads"] or heads,
        "rms_norm_eps": shape["rms_norm_eps"],
        "rope_theta": shape["rope_theta"],
        **({"rope_scaling": scaling} if scaling["rope_type"] != "default" else {}),
        "tie_word_embeddings": shape["tie_word_embeddings"],
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        "bos_token_id": None,
        **ids,
    }


def weights_stem(model_type: str, version: int) -> str:
    """How the names of a folder's weight files begin."""
    return "sltrain" if model_type == COMPRESSED and version < 3 else "model"


def tensor_sizes(layers: dict[str, nn.Module]) -> dict[str, Any]:
    """Of each layer with an S: its number of values, and the number and dtype of their indices."""
    tensors = {name: layer.state_dict() for name, layer in layers.items()}
    return {
        name: {
            "values": len(own["values"]),
            "indices": len(own["indices"]),
            "dtype": str(own["indices"].dtype).removeprefix("torch."),
        }
        for name, own in tensors.items()
        if "indices" in own
    }


def tokenizer_config(max_length: int, settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json; `settings` are the tokens that begin, end and pad texts, and how written out ones are
    read, under transformers' names (data/special_tokens.py)."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",  # a continuation must follow its prompt, not the pads
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **settings,
    }


def plain_tokenizer(text: str) -> str:
    """A tokenizer.json that neither truncates nor pads by itself; `text` itself if that is so already."""
    content = json.loads(text)
    unwanted = {"truncation": None, "padding": None}
    if all(content.get(key) is None for key in unwanted):
        return text
    return json.dumps({**content, **unwanted}, ensure_ascii=False, indent=2)


def write_code(folder: Path, kinds: Mapping[str, Path]) -> None:
    """modeling_sltrain.py, and each of `kinds`, the files of kinds of layers that it does not hold: there the class
    `Linear` is made as modeling_sltrain.py makes its own. transformers copies what is imported by such lines."""
    code = CODE.read_text(encoding="utf-8")
    for kind, file in sorted(kinds.items()):
        (folder / f"layer_{kind}.py").write_bytes(file.read_bytes())
        code += f"\nfrom .layer_{kind} import Linear as layer_{kind}  # noqa: E402\n\nKINDS[{kind!r}] = layer_{kind}\n"
    (folder / CODE.name).write_text(code, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if it is none, or OSError if the file cannot be read."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it should hold one object")
    return content


def card_metadata(
    name: str,
    library: str,
    license: str | None,
    datasets: list[str],
    corpus: str,
    perplexity: float | None,
    tags: list[str],
) -> str:
    """What the Hub reads at the top of a model card, as YAML. `datasets` are names on the Hub, `corpus` is what the
    validation perplexity (None: there is none) was measured on. Without a license the key is left out."""
    from huggingface_hub import EvalResult, ModelCardData  # 0.3 s

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=corpus,
            dataset_name=corpus,
            dataset_split="validation",
            metric_type="perplexity",
            metric_value=round(value, 4),
        )
        for value in [perplexity]
        if value is not None and math.isfinite(value)
    ]
    return ModelCardData(
        library_name=library,
        license=license,
        pipeline_tag="text-generation",
        tags=tags,
        datasets=datasets or None,
        metrics=["perplexity"] if results else None,
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def model_card(**facts: Any) -> str:
    """README.md of an exported folder. The facts are the template's variables; a missing one is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(CARD.read_text()).render(**facts)
