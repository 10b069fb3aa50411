"""What was trained, opened again: a run's checkpoint, or an exported folder -> the model, its tokenizer, its history.

Opening reads no weights: the model is on the meta device, its layers in place, and the files are checked to hold
exactly its tensors. `Saved.load` then gives the model with its weights; an export takes them layer by layer.
"""

from copy import deepcopy
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from sltrain.building.model import build_model
from sltrain.building.phases import change_until
from sltrain.compose import read_config, read_plain
from sltrain.config import ROPE_TYPES, ModelConfig, RopeScaling, TrainConfig
from sltrain.data.special_tokens import AS_TEXT, read_settings
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine import ema
from sltrain.engine.checkpoint import Checkpointer, is_in_shares
from sltrain.engine.checkpoint_files import Stored
from sltrain.engine.memory import is_out_of_memory
from sltrain.formats.folder import COMPRESSED, DENSE, READABLE_VERSIONS, Facts, read_json, weights_stem
from sltrain.formats.weights import WeightFiles
from sltrain.layers.base import ReplacedLinear
from sltrain.layers.convert import UnknownKind, restore_layers
from sltrain.layers.cost import set_paths
from sltrain.log import first_line
from sltrain.models.llama import LlamaForCausalLM
from sltrain.runs.run_folder import RunFolder

EMBEDDING = "model.embed_tokens.weight"


class AveragedFiles(WeightFiles):
    """The tensors of a checkpoint of a run with `ema`: those that were trained as their averages, in their own
    dtype."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._averages = torch.load(folder / ema.FILE, map_location="cpu", weights_only=True, mmap=True)

    def read(self, name: str) -> torch.Tensor:
        average = self._averages.get(name)
        return super().read(name) if average is None else average.to(self.dtype(name))


class SharedFiles(WeightFiles):
    """The same of a checkpoint to which every process wrote its share; averages only if the run has them."""

    def __init__(self, folder: Path, averages: bool) -> None:
        from sltrain.engine.sharded_files import ShardedFiles  # DCP takes seconds to import

        self.folder, shares = folder, ShardedFiles(folder)
        self._tensors = shares.tensors()
        self._averages = shares.tensors(f"action/{ema.NAME}") if averages else {}

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._averages.get(name, self._stored(name)).read(None).to(self.dtype(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._stored(name).dtype)
        return dtype

    def _stored(self, name: str) -> Stored:
        if name not in self._tensors:
            raise ValueError(f"{self.folder} holds no tensor {name}")
        return self._tensors[name]


@dataclass
class Weights:
    """The weights of a model on the disk."""

    path: Path
    files: WeightFiles
    model: LlamaForCausalLM  # on the meta device, in the dtype of the files

    def dense_weight(self, name: str) -> torch.Tensor:
        """W of the layer called `name`, (out, in) float32, on the CPU."""
        if isinstance(self.model.get_submodule(name), ReplacedLinear):
            weight: torch.Tensor = self.read_layer(name, torch.float32).dense_weight()
            return weight
        return self.files.read(f"{name}.weight").float()

    def read_layer(self, name: str, dtype: torch.dtype) -> Any:
        """A copy of the module called `name` with its weights, in `dtype`; the model's own stays without memory."""
        layer = deepcopy(self.model.get_submodule(name))
        self.files.fill(layer, f"{name}.", dtype=dtype)
        return layer


@dataclass
class Saved(Weights):
    """A model that was trained here, on the disk."""

    tokenizer: Tokenizer
    seq_len: int  # tokens a row, as it was trained
    padding: str
    attention: str
    step: int  # updates
    config: TrainConfig | None  # of a run; an export has none
    progress: dict[str, Any]  # of a run: its counters, see engine/trainer.py

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @property
    def context(self) -> int:
        """Positions that the model reads at most."""
        return self.model.config.max_position_embeddings

    def load(self, device: torch.device, dtype: torch.dtype | None = None, num_rows: int = 1) -> LlamaForCausalLM:
        """The model with its weights, once. It computes as in training, unless `dtype` is given. Each W x is computed
        by what is cheaper for `num_rows` rows of x at a time. Raises ValueError if it does not fit into memory."""
        try:
            self.files.fill(self.model, device=device, dtype=dtype)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(f"the model does not fit into the memory of {device}; use another device") from error
        if dtype is not None:
            self.model.model.compute_dtype = None
        set_paths(self.model, "auto", num_rows, device)
        return self.model


def open_saved(path: str | PathLike[str], step: int | None = None) -> Saved:
    """Open a run folder (at its newest intact checkpoint, or at `step`) or an exported folder. Raises ValueError or
    OSError for what is neither, damaged, or of another version."""
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        if step is not None:
            raise ValueError(f"{path} is an export, which holds one step; leave the step out, or name the run folder")
        return open_export(path)
    if RunFolder(path).config_file.is_file():
        return open_run(path, step)
    what = "holds neither a run (config.yaml, checkpoints/) nor an export (config.json)"
    raise ValueError(f"{path} {what if path.exists() else 'does not exist'}; name a run folder or an exported one")


def open_run(path: Path, step: int | None) -> Saved:
    """Open a run folder at one of its checkpoints."""
    folder = RunFolder(path)
    config = read_config(folder.config_file)
    averages = () if config.ema is None else (ema.FILE,)
    checkpointer = Checkpointer(path, config.keep_last, to_train=False, needed=averages)
    checkpoint = checkpointer.find_latest() if step is None else checkpointer.find(step)
    if checkpoint is None:
        if folder.is_finished:
            raise ValueError(f"{path} is a finished run without checkpoints/; copy that from where the run was made")
        raise ValueError(f"{path} holds no checkpoint; a run saves every checkpoint_every updates, and at its end")
    if is_in_shares(checkpoint):
        files: WeightFiles = SharedFiles(checkpoint, bool(averages))
    else:
        files = AveragedFiles(checkpoint) if averages else WeightFiles(checkpoint)
    vocab_size = files.shape(EMBEDDING)[0]
    state = checkpointer.read_state(checkpoint)
    model = build_model(config, vocab_size, files.dtype(EMBEDDING))
    change_until(config, model, state["step"])
    files.check(model)
    tokenizer = read_tokenizer(folder.tokenizer_file, vocab_size)
    rows = config.seq_len, config.padding, config.attention
    return Saved(path, files, model, tokenizer, *rows, state["step"], config, state["progress"])


def open_export(path: Path) -> Saved:
    """Open what `sltrain-export` wrote, of either format."""
    content = read_json(path / "config.json")
    own, kind = content.get("sltrain"), content.get("model_type")
    if not isinstance(own, dict) or kind not in (DENSE, COMPRESSED):
        raise ValueError(f"{path} was not exported by sltrain; name a run folder or a folder that sltrain-export wrote")
    if own.get("format_version") not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ValueError(f"{path} has format version {own.get('format_version')}, this program reads {readable}")
    files = WeightFiles(path, weights_stem(kind, own["format_version"]))
    dtype = files.dtype(EMBEDDING)
    try:
        facts = read_plain(Facts, own)
        shape = read_plain(ModelConfig, {**content, **_rotary(content), "name": facts.model})
        with torch.device("meta"):
            model = LlamaForCausalLM(shape).to(dtype)
        restore_layers(model, facts.layers)
    except UnknownKind as error:
        raise ValueError(f"{path}: {error}") from error
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path / 'config.json'} is damaged ({first_line(error)}); export the run again") from error
    files.check(model)
    tokenizer = read_tokenizer(path / "tokenizer.json", shape.vocab_size)
    rows = facts.seq_len, facts.padding, facts.attention
    return Saved(path, files, model, tokenizer, *rows, facts.step, config=None, progress={})


def open_transformers(path: Path) -> Weights:
    """Open a folder in which transformers saved a LLaMA (save_pretrained, or a download from the Hub). Raises
    ValueError for another model, and for one that computes what ours does not."""
    content = read_json(path / "config.json")
    if content.get("model_type") != DENSE:
        raise ValueError(f"a model of type {content.get('model_type')}; a LLaMA is needed (model_type llama)")
    if not any(path.glob("model*.safetensors")):
        raise ValueError("no weights in safetensors; write them with transformers: model.save_pretrained(DIR)")
    scaling = content.get("rope_scaling") or content.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    content = {**content, **_rotary(content), "name": path.name}
    heads = content.get("num_attention_heads") or 1
    unknown = {
        "attention_bias": content.get("attention_bias", False) is not False,
        "mlp_bias": content.get("mlp_bias", False) is not False,
        "hidden_act": content.get("hidden_act", "silu") != "silu",
        "head_dim": content.get("head_dim", None) not in (None, content.get("hidden_size", 0) // heads),
        "rope_scaling": rope_type not in ROPE_TYPES,
    }
    if (key := next((key for key, differs in unknown.items() if differs), None)) is not None:
        value = rope_type if key == "rope_scaling" else content[key]
        raise ValueError(f"{key}={value}, which models here do not have")
    shape = read_plain(ModelConfig, content)
    files = WeightFiles(path)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape).to(files.dtype("model.embed_tokens.weight"))
    for name, tensor in model.state_dict().items():
        if files.shape(name) != tuple(tensor.shape):
            raise ValueError(f"{name} is {files.shape(name)}, its config.json says {tuple(tensor.shape)}")
    return Weights(path, files, model)


def _rotary(content: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling of a config.json: transformers 5 writes both as rope_parameters."""
    again = content.get("rope_parameters") or {}
    known = {item.name for item in fields(RopeScaling)}
    scaling = {key: value for key, value in (content.get("rope_scaling") or again).items() if key in known}
    return {"rope_theta": content.get("rope_theta", again.get("rope_theta", 10000.0)), "rope_scaling": scaling}


def read_tokenizer(path: Path, vocab_size: int | None) -> Tokenizer:
    """The tokenizer that a run or an export was saved with."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; copy it from where the folder comes from") from error
    settings = read_settings(path.parent)
    return Tokenizer(
        text, str(path), vocab_size, settings=settings, controls_as_text=bool(settings.get(AS_TEXT, False))
    )
