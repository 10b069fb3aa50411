"""A checkpoint -> a folder that others open: dense for transformers and all that reads its format, or compressed.

Layer after layer is read from the checkpoint, merged in float32 and rounded once, and written; at most a shard of
5 GB is held. The folder has another name until its files, read back, have been found to be the trained model: an
export that is there is whole, and right.
"""

import glob
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from sltrain.api.card import card, check_license
from sltrain.api.verify import verify
from sltrain.building.model import dtype_name
from sltrain.building.saved import Saved
from sltrain.config import TrainConfig
from sltrain.formats.folder import (
    AUTO_MAP,
    CODE_KINDS,
    COMPRESSED,
    FORMAT_VERSION,
    Facts,
    llama_config,
    plain_tokenizer,
    tensor_sizes,
    tokenizer_config,
    write_code,
    write_json,
)
from sltrain.formats.weights import MAX_SHARD_BYTES, stored, write_weights
from sltrain.layers.base import ReplacedLinear
from sltrain.layers.convert import layer_settings
from sltrain.models.llama import LlamaForCausalLM

logger = logging.getLogger(__name__)


def export(
    saved: Saved,
    output: Path,
    format: str,
    dtype: torch.dtype | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    license: str | None = None,
) -> None:
    """Write `saved`, a run, to the new folder `output`, in its own dtype if `dtype` is None. `license` goes into the
    model card. Raises ValueError or OSError, and then leaves nothing behind."""
    if saved.config is None:
        raise ValueError(f"{saved.path} is an export already; name the run folder it came from")
    _check_format(saved, saved.config.method.name, format)
    check_license(license)
    output = output.resolve()  # a link's target, and a name where there was a dot
    _check_free(output)
    dtype = dtype or saved.dtype
    for left in output.parent.glob(f"{glob.escape(output.name)}.partial-*"):
        logger.info(f"note       {left} is of an export that still runs, or was killed; then delete it")
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_texts(saved, saved.config, partial, format, dtype)
        facts = card(saved, saved.config, format, dtype_name(dtype), kinds_without_code(saved), license)
        (partial / "README.md").write_text(facts, encoding="utf-8")
        num_bytes = _write_weights(saved, partial, format, dtype, max_shard_bytes)
        logger.info(f"written    {num_bytes / 1e6:,.1f} MB of weights, {format}, {dtype_name(dtype)}")
        logger.info(f"verified   {verify(saved, partial, dtype)}")
        if format == "compressed" and (kinds := kinds_without_code(saved)):
            logger.info(f"note       {_opened_here_only(saved, kinds)}")
        _check_free(output)  # another one may have been faster
        output.mkdir(exist_ok=True)
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_format(saved: Saved, method: str, format: str) -> None:
    layers = [module for module in saved.model.modules() if isinstance(module, ReplacedLinear)]
    if format == "compressed" and not layers:
        raise ValueError(
            f"{saved.path} was trained with method={method}: there is nothing to compress; use --format dense"
        )
    kinds = sorted({layer.kind for layer in layers if not layer.is_mergeable})
    if format == "dense" and kinds:
        raise ValueError(
            f"{saved.path}: layers of kind {', '.join(kinds)} are not one matrix each; use --format compressed"
        )


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "exists and is not empty" if output.is_dir() else "is a file"
        raise ValueError(f"{output} {what}; name another folder")


def _write_texts(saved: Saved, config: TrainConfig, folder: Path, format: str, dtype: torch.dtype) -> None:
    """Everything but the weights and the card: see formats/folder.py."""
    tokenizer, shape = saved.tokenizer, asdict(saved.model.config)
    ids = {f"{name}_id": number for name, number in tokenizer.special_ids().items() if name != "unk_token"}
    facts = Facts(
        FORMAT_VERSION, format, config.model.name, config.method.name, saved.seq_len, saved.padding, saved.step
    )
    facts.attention = saved.attention
    content = llama_config(shape, saved.model.lm_head.out_features, dtype_name(dtype), ids)
    if format == "compressed":
        content |= {"model_type": COMPRESSED, "architectures": ["SLTrainLlamaForCausalLM"]}
        facts.layers = layer_settings(saved.model)
        if opens_by_code(saved):
            content["auto_map"] = AUTO_MAP
            facts.tensors = tensor_sizes({name: saved.model.get_submodule(name) for name in facts.layers})
            write_code(folder, {kind: file for kind, file in _code_files(saved).items() if file is not None})
    write_json(folder / "config.json", {**content, "sltrain": asdict(facts)})
    write_json(folder / "generation_config.json", {"do_sample": False, **ids})
    write_json(folder / "tokenizer_config.json", tokenizer_config(saved.context, tokenizer.settings()))
    (folder / "tokenizer.json").write_bytes(plain_tokenizer(tokenizer.json).encode())


def opens_by_code(saved: Saved) -> bool:
    """Whether transformers opens a compressed export of it, by modeling_sltrain.py."""
    return not kinds_without_code(saved)


def kinds_without_code(saved: Saved) -> list[str]:
    """The kinds of its layers for which there is no code for transformers."""
    return sorted(kind for kind, file in _code_files(saved).items() if file is None)


def _opened_here_only(saved: Saved, kinds: list[str]) -> str:
    """What a compressed export with layers of such kinds is not, and what to do instead."""
    layers = [module for module in saved.model.modules() if isinstance(module, ReplacedLinear)]
    instead = "; --format dense makes one for transformers" if all(layer.is_mergeable for layer in layers) else ""
    return f"layers of kind {', '.join(kinds)} have no code for transformers: only sltrain.load opens it{instead}"


def _code_files(saved: Saved) -> dict[str, Path | None]:
    """The files of kinds that modeling_sltrain.py does not hold itself; None for a kind that brings none."""
    layers = [module for module in saved.model.modules() if isinstance(module, ReplacedLinear)]
    return {layer.kind: layer.code_file() for layer in layers if layer.kind not in CODE_KINDS}


def how_to_open(saved: Saved, format: str, folder: Path) -> str:
    """Python that opens the export."""
    if format == "compressed" and not opens_by_code(saved):
        return f"sltrain.load({str(folder)!r})"
    trust = ", trust_remote_code=True" if format == "compressed" else ""
    return f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}{trust})"


def _write_weights(saved: Saved, folder: Path, format: str, dtype: torch.dtype, max_shard_bytes: int) -> int:
    """The weights, layer by layer; return their bytes."""
    if format == "compressed":
        shapes = {name: stored(tensor, dtype, saved.dtype) for name, tensor in saved.model.state_dict().items()}
        return write_weights(
            folder, shapes, lambda name: stored(saved.files.read(name), dtype, saved.dtype), max_shard_bytes
        )
    with torch.device("meta"):
        dense = LlamaForCausalLM(saved.model.config).to(dtype)
    return write_weights(folder, dense.state_dict(), lambda name: _dense(saved, name).to(dtype), max_shard_bytes)


def _dense(saved: Saved, name: str) -> Tensor:
    """The tensor that a dense model has under `name`, merged if need be, in float32 then."""
    module_name, _, leaf = name.rpartition(".")
    layer = saved.model.get_submodule(module_name)
    if leaf != "weight" or not isinstance(layer, ReplacedLinear):
        return saved.files.read(name)
    return saved.read_layer(module_name, torch.float32).dense_weight()
