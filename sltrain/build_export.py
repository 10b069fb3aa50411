"""A checkpoint -> a folder that others open: dense for transformers and all that reads its format, or compressed.

Layer after layer is read from the checkpoint, merged in float32 and rounded once, and written; at most a shard of
5 GB is held. The folder has another name until its logits, computed from the files as they were written, are those of
the trained model: an export that is there is whole, and right.
"""

import math
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sltrain.build_saved import Saved, open_export
from sltrain.config import TrainConfig
from sltrain.engine.run_record import read_run
from sltrain.formats.folder import (
    COMPRESSED,
    FORMAT_VERSION,
    STEMS,
    Facts,
    llama_config,
    model_card,
    tokenizer_config,
    write_json,
)
from sltrain.formats.weights import MAX_SHARD_BYTES, cast, write_weights
from sltrain.layers.convert import layer_settings
from sltrain.layers.linear import LowRankLinear, SLTrainLinear
from sltrain.models.accounting import count_parameters
from sltrain.models.llama import LlamaForCausalLM

CHECKED_SHAPE = (2, 64)  # sequences and positions whose logits are compared
# Largest difference of logits, over the largest logit: of two orders of summation; of weights rounded to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclass
class Agreement:
    """How far the logits of an export are from those of the trained model."""

    difference: float  # the largest, absolute
    largest: float  # logit
    num_same: int  # positions whose likeliest next token is the same
    num_positions: int


def export(
    saved: Saved,
    output: Path,
    format: str,
    dtype: torch.dtype | None,
    report: Callable[[str], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `saved`, a run, to the new folder `output`, in its own dtype if `dtype` is None. Raises ValueError or
    OSError, and then leaves nothing behind."""
    if saved.config is None:
        raise ValueError(f"{saved.path} is an export already; name the run folder it came from")
    if format == "compressed" and saved.config.method.name == "full":
        raise ValueError(f"{saved.path} was trained with method=full: there is nothing to compress; use --format dense")
    output = output.resolve()  # a link's target, and a name where there was a dot
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; name another folder")
    dtype = dtype or saved.dtype
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        num_bytes = _write(saved, saved.config, partial, format, dtype, max_shard_bytes)
        report(f"written    {num_bytes / 1e6:,.1f} MB of weights, {format}, {_name(dtype)}")
        agreement = compare_logits(saved, partial, dtype)
        if not math.isfinite(agreement.largest):
            raise ValueError(f"{saved.path}: the logits of step {saved.step} are not finite; export an earlier step")
        if not agreement.difference <= TOLERANCE[dtype] * max(1.0, agreement.largest):  # also of what is no number
            raise AssertionError(f"the exported model differs from the trained one: {describe(agreement)}")
        report(f"verified   {describe(agreement)}")
        output.mkdir(exist_ok=True)
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def describe(agreement: Agreement) -> str:
    """A comparison of logits in words."""
    a = agreement
    return (
        f"logits of {a.num_positions} positions, from the files as written: at most {a.difference:.1e} from the trained"
        f" model's (up to {a.largest:.1f}), the same next token at {a.num_same}"
    )


def _write(
    saved: Saved, config: TrainConfig, folder: Path, format: str, dtype: torch.dtype, max_shard_bytes: int
) -> int:
    """Fill `folder`; return the bytes of its weights."""
    tokenizer, shape = saved.tokenizer, asdict(saved.model.config)
    ids = {f"{name}_id": number for name, number in tokenizer.special_ids().items() if name != "unk_token"}
    facts = Facts(
        FORMAT_VERSION, format, config.model.name, config.method.name, saved.seq_len, saved.padding, saved.step
    )
    content = llama_config(shape, saved.model.lm_head.out_features, _name(dtype), ids)
    if format == "compressed":
        content |= {"model_type": COMPRESSED, "architectures": ["SLTrainLlamaForCausalLM"]}
        facts.layers = layer_settings(saved.model)
    write_json(folder / "config.json", {**content, "sltrain": asdict(facts)})
    write_json(folder / "generation_config.json", {"do_sample": False, **ids})
    write_json(folder / "tokenizer_config.json", tokenizer_config(saved.context, tokenizer.special_tokens()))
    (folder / "tokenizer.json").write_text(tokenizer.json)
    (folder / "README.md").write_text(_card(saved, config, format, dtype))
    if format == "compressed":
        shapes = {name: cast(tensor, dtype) for name, tensor in saved.model.state_dict().items()}
        return write_weights(
            folder, shapes, lambda name: cast(saved.files.read(name), dtype), max_shard_bytes, STEMS[COMPRESSED]
        )
    with torch.device("meta"):
        dense = LlamaForCausalLM(saved.model.config).to(dtype)
    return write_weights(folder, dense.state_dict(), lambda name: _dense(saved, name).to(dtype), max_shard_bytes)


def _dense(saved: Saved, name: str) -> Tensor:
    """The tensor that a dense model has under `name`, merged if need be, in float32 then."""
    module_name, _, leaf = name.rpartition(".")
    layer = saved.model.get_submodule(module_name)
    if leaf != "weight" or not isinstance(layer, SLTrainLinear | LowRankLinear):
        return saved.files.read(name)
    own = deepcopy(layer)
    saved.files.fill(own, f"{module_name}.", dtype=torch.float32)
    return own.dense_weight()


def compare_logits(saved: Saved, folder: Path, dtype: torch.dtype) -> Agreement:
    """Compute the logits of random ids by the trained model, through A, B and S, and by the one in `folder`. One of
    the two is in memory at a time."""
    num_positions = min(CHECKED_SHAPE[1], saved.context)
    generator = torch.Generator().manual_seed(0)
    vocab_size = saved.model.lm_head.out_features
    ids = torch.randint(vocab_size, (CHECKED_SHAPE[0], num_positions), generator=generator)

    def logits_of(source: Saved, its_dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            model = source.load(torch.device("cpu"), its_dtype, layer_path="factored")
            logits = model(ids).float()
            model.to("meta")
        return logits

    trained = logits_of(saved, torch.promote_types(saved.dtype, dtype))
    exported = logits_of(open_export(folder, lambda line: None), dtype)
    same = int((trained.argmax(-1) == exported.argmax(-1)).sum())
    return Agreement(float((trained - exported).abs().max()), float(trained.abs().max()), same, ids.numel())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _card(saved: Saved, config: TrainConfig, format: str, dtype: torch.dtype) -> str:
    record = read_run(saved.path)
    evaluations = [line for line in [*record.evals, record.final] if line and line["step"] == saved.step]
    return model_card(
        config=config,
        format=format,
        dtype=_name(dtype),
        step=saved.step,
        progress=saved.progress,
        parameters=count_parameters(saved.model),
        evaluation=evaluations[-1] if evaluations else None,
    )
