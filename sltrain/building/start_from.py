"""init_from=: a new run begins with weights that were trained before, by any method, at step 0.

    the same kind of layer with the same settings    its tensors are copied, positions of S included, by `copy_trained`
                                                     (layers/base.py)
    nn.Linear here (method=full)                     the dense W of the other model
    any other layer                                  `set_weight` (layers/base.py) brings its W near that W: B A by a
                                                     singular value decomposition, S by what is left at its positions
    embeddings, norms, head                          copied

A method with `num_calibration_rows` has layers fitted to the inputs that they see in the first rows of the training
text, by `fit` in place of `set_weight`, decoder layer by decoder layer (calibrate.py).

The other model is a run (its newest checkpoint, or RUN/checkpoints/step_00001000), what sltrain-export wrote, or a
folder of transformers with a LLaMA in safetensors. One W at a time is dense, in float32. Ranks share the decompositions
and hand the results to each other. Only a run without a checkpoint reads that folder: later it may be gone.
"""

import dataclasses
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sltrain.building.calibrate import LayerInputs
from sltrain.building.saved import EMBEDDING, Weights, open_saved, open_transformers
from sltrain.config import ModelConfig, TrainConfig, folder_of
from sltrain.data.rows import RowTensors
from sltrain.engine.distributed import Ranks
from sltrain.engine.micro_batch import split_rows
from sltrain.formats.folder import read_json
from sltrain.layers.base import ReplacedLinear, is_plain_linear
from sltrain.models.llama import LlamaForCausalLM

logger = logging.getLogger(__name__)

L = TypeVar("L", bound=ReplacedLinear)

HEAD = "lm_head.weight"
# Keys of the model that change no weight and no product with them.
FREE_KEYS = ("name", "max_position_embeddings", "initializer_range", "vocab_size")


@dataclass
class Start:
    """A model to begin with; its weights are still in their files."""

    name: str  # as typed
    saved: Weights
    step: int | None = None  # updates it was trained for; None: unknown
    text: RowTensors | None = None  # what layers are fitted to, if the method wants to see some (methods/base.py)

    @property
    def vocab_size(self) -> int:
        return self.saved.model.lm_head.out_features

    def check(self, model: LlamaForCausalLM, config: TrainConfig, tokenizer_json: str) -> None:
        """Raise ValueError unless every layer of `model`, on the meta device, can begin with these weights; say so if
        the tokenizer is not the one they were trained with."""
        wanted, own = model.lm_head.out_features, folder_of(self.name) / "tokenizer.json"
        if wanted != self.vocab_size:
            raise ValueError(
                f"init_from={self.name} has {self.vocab_size:,} ids, this model {wanted:,} (those of"
                f" tokenizer={config.tokenizer}); name the tokenizer that it was trained with, and"
                f" model.vocab_size={self.vocab_size} if that has fewer ids"
            )
        if own.is_file() and own.read_bytes() != tokenizer_json.encode():
            logger.info(f"note       the tokenizer is not {own}: an id may mean another piece than the weights know")
        for name, layer in _replaced(model).items():
            theirs = self.saved.model.get_submodule(name)
            if is_same(layer, theirs):
                continue
            if not (layer.starts_from_dense() and layer.is_mergeable):
                why = "" if layer.is_mergeable else ", which are not one matrix each,"
                raise ValueError(
                    f"init_from={self.name}: layers of kind {layer.kind}{why} cannot start from a dense matrix"
                )
            if isinstance(theirs, ReplacedLinear) and not theirs.is_mergeable:
                raise ValueError(f"init_from={self.name}: its layers of kind {theirs.kind} are not one matrix each")

    def fill(self, model: LlamaForCausalLM, ranks: Ranks, micro_batch_size: int = 1) -> None:
        """Give a model with memory, whose supports are drawn, these weights, and log how near they are. `text` goes
        through the model so many rows at a time."""
        fitted = {
            name: layer
            for name, layer in _replaced(model).items()
            if not is_same(layer, self.saved.model.get_submodule(name))
        }
        self._copy(model, fitted)
        if self.text is None or not fitted:
            self._tell(self._fit_all(fitted, ranks, {}))
            return
        logger.info(f"calibrate  on the first {len(self.text.input_ids):,} rows of the training text")
        inputs = LayerInputs(model, split_rows(self.text, micro_batch_size, ranks.device))
        errors: dict[str, float] = {}
        while inputs.number < len(model.model.layers):
            own = {name: layer for name, layer in fitted.items() if name.startswith(inputs.prefix)}
            moments = ranks.everywhere(partial(inputs.moments, own, self.saved.dense_weight))
            errors |= self._fit_all(own, ranks, moments)
            inputs.advance()
        self._tell(errors)

    def _fit_all(self, layers: dict[str, ReplacedLinear], ranks: Ranks, moments: dict[str, Tensor]) -> dict[str, float]:
        """Fit these layers; return the error of each."""
        return share_out(layers, ranks, lambda name, layer: self._fit(name, layer, moments.get(name)))

    @torch.no_grad()
    def _copy(self, model: nn.Module, fitted: dict[str, ReplacedLinear]) -> None:
        """All tensors but those of fitted layers."""
        replaced = _replaced(model)
        for name, layer in replaced.items():
            if name not in fitted:
                layer.copy_trained(partial(self._read_of, name))
        for name, tensor in model.state_dict().items():
            parent, _, leaf = name.rpartition(".")
            if any(f"{name}.".startswith(f"{layer}.") for layer in replaced):
                continue
            tensor.copy_(self.saved.dense_weight(parent) if self._is_merged(model, parent, leaf) else self._read(name))

    def _is_merged(self, model: nn.Module, module: str, leaf: str) -> bool:
        """Whether this is the weight of a linear that another layer of the saved model takes the place of."""
        theirs = self.saved.model.get_submodule(module)
        return leaf == "weight" and is_plain_linear(model.get_submodule(module)) and isinstance(theirs, ReplacedLinear)

    def _read_of(self, module: str, leaf: str) -> Tensor:
        return self._read(f"{module}.{leaf}")

    def _read(self, name: str) -> Tensor:
        is_tied = name == HEAD and HEAD not in self.saved.files.names()
        return self.saved.files.read(EMBEDDING if is_tied else name)

    @torch.no_grad()
    def _fit(self, name: str, layer: ReplacedLinear, moment: Tensor | None) -> float:
        """Bring the W of a layer near that of the saved one, for inputs of this moment if it is known; return
        |difference| / |W|."""
        weight = self.saved.dense_weight(name).to(next(layer.parameters()).device)
        if moment is None:
            layer.set_weight(weight)
        else:
            layer.fit(weight, moment)
        if layer.bias is not None:
            layer.bias.data.copy_(self.saved.files.read(f"{name}.bias"))
        size = weight.norm().item()
        return (layer.dense_weight().float() - weight).norm().item() / size if size else 0.0

    def _tell(self, errors: dict[str, float]) -> None:
        where = f"init from  {self.name}{f', step {self.step:,}' if self.step is not None else ''}"
        if not errors:
            logger.info(f"{where}: all weights copied")
            return
        worst = max(errors, key=lambda name: errors[name])
        logger.info(
            f"{where}: {len(errors)} matrices approximated, relative error: median"
            f" {statistics.median(errors.values()):.4f}, worst {errors[worst]:.4f} ({worst})"
        )


def share_out(layers: dict[str, L], ranks: Ranks, change: Callable[[str, L], float]) -> dict[str, float]:
    """Change these layers in place, each on one rank, which hands all its tensors to the others; return, on all ranks,
    what `change` returned for each."""
    found: dict[str, float] = {}
    for number, (name, layer) in enumerate(layers.items()):
        if number % ranks.world_size == ranks.rank:
            found[name] = change(name, layer)
        else:
            for tensor in layer.state_dict().values():
                tensor.zero_()
    for layer in layers.values():
        for tensor in layer.state_dict().values():  # masks and positions byte by byte: gloo sums no uint16
            ranks.sum_(tensor if tensor.is_floating_point() else tensor.view(torch.uint8))
    return {name: number for part in ranks.gather(found) for name, number in part.items()}


def open_start(config: TrainConfig) -> Start | None:
    """What `init_from` names; None if it is not set. Raises ValueError as `open_weights`."""
    if config.init_from is None:
        return None
    return Start(config.init_from, *open_weights(config, "init_from", config.init_from))


def open_weights(config: TrainConfig, key: str, name: str) -> tuple[Weights, int | None]:
    """What this value of a key names, opened without reading weights, and the updates it was trained for (None:
    unknown). Raises ValueError for what cannot be opened, and for a model of another shape."""
    try:
        saved, step = _open(name)
    except (ValueError, OSError) as error:
        raise ValueError(f"{key}={name}: {error}") from error
    _check_shape(config, f"{key}={name}", saved.model.config)
    return saved, step


def _open(name: str) -> tuple[Weights, int | None]:
    path, folder = Path(name).expanduser(), folder_of(name)
    if not path.is_dir():
        is_on_hub = name.count("/") == 1 and name[0] not in "/.~"
        hub = f"; download a model of the Hub first: hf download {name} --local-dir DIR" if is_on_hub else ""
        raise ValueError(f"there is no such folder here{hub}")
    if (path / "config.json").is_file() and "sltrain" not in read_json(path / "config.json"):
        return open_transformers(path), None
    saved = open_saved(folder, None if folder == path else int(path.resolve().name.removeprefix("step_")))
    return saved, saved.step


def _check_shape(config: TrainConfig, typed: str, theirs: ModelConfig) -> None:
    """Raise ValueError, with the keys to type, if the weights are of a model of another shape."""

    def shape(model: ModelConfig) -> dict[str, Any]:
        values = {item.name: getattr(model, item.name) for item in dataclasses.fields(model)}
        scaling = values.pop("rope_scaling")
        used = {"rope_type": "default"} if scaling.rope_type == "default" else dataclasses.asdict(scaling)
        values |= {f"rope_scaling.{key}": value for key, value in used.items()}
        values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
        return {key: value for key, value in values.items() if key not in FREE_KEYS}

    own, other = shape(config.model), shape(theirs)
    if config.model.vocab_size is not None:
        own["vocab_size"], other["vocab_size"] = config.model.vocab_size, theirs.vocab_size
    own["tie_word_embeddings"] |= theirs.tie_word_embeddings  # a tied matrix can begin as two
    differing = [key for key in other if own.get(key) != other[key]]
    if differing:
        said = ", ".join(f"{key} {other[key]}, not {own.get(key)}" for key in differing)
        wanted = " ".join(f"model.{key}={'null' if other[key] is None else other[key]}" for key in differing)
        raise ValueError(f"{typed} has another shape than model={config.model.name}: {said}; type {wanted}")


def _replaced(model: nn.Module) -> dict[str, ReplacedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ReplacedLinear)}


def is_same(layer: ReplacedLinear, theirs: nn.Module) -> bool:
    """Whether both are of one kind with equal settings, so that tensors mean the same."""
    return (
        isinstance(theirs, ReplacedLinear)
        and theirs.kind == layer.kind
        and theirs.settings() == layer.settings()
        and theirs.state_dict().keys() == layer.state_dict().keys()
    )
