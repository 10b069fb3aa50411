"""Weights that were trained before, in a new model: exact where they can be, near where not, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sltrain.building.model import allocate, build_model
from sltrain.building.start_from import open_start
from sltrain.compose import TRAIN, compose_config
from sltrain.config import RopeScaling, TrainConfig
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.checkpoint_files import Contents
from sltrain.engine.distributed import Ranks
from sltrain.layers import ReplacedLinear
from sltrain.models.llama import LlamaForCausalLM

BASE = [
    "model=llama_tiny",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "max_steps=3",
    "data=stdlib",
    "rank=8",
]
CPU = Ranks(0, 1, torch.device("cpu"))
VOCABULARY = 64


def build(config: TrainConfig) -> LlamaForCausalLM:
    model = build_model(config, VOCABULARY, torch.float32)
    allocate(model, CPU.device)
    model.init_weights(config.seed)
    return model


@pytest.fixture
def saved_run(tmp_path: Path, tokenizer_file: Path) -> Callable[..., tuple[Path, LlamaForCausalLM]]:
    """Overrides -> a run folder with a checkpoint of step 7, and its model."""

    def make(
        *overrides: str, change: Callable[[LlamaForCausalLM], None] = lambda model: None
    ) -> tuple[Path, LlamaForCausalLM]:
        folder = tmp_path / "run"
        config = compose_config([*BASE, *overrides], TRAIN)
        model = build(config)
        for parameter in model.parameters():  # B is 0 before training
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        change(model)
        Checkpointer(folder, 2).write(Contents.of(7, model, {}, {"progress": {}}))
        (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
        tokenizer = json.loads(tokenizer_file.read_text())
        (folder / "tokenizer.json").write_text(json.dumps(_first_pieces(tokenizer, VOCABULARY)))
        return folder, model

    return make


def _first_pieces(tokenizer: dict, number: int) -> dict:
    vocabulary = {piece: i for piece, i in tokenizer["model"]["vocab"].items() if i < number}
    return {**tokenizer, "model": {**tokenizer["model"], "vocab": vocabulary, "merges": []}}


def started(source: Path, *overrides: str) -> LlamaForCausalLM:
    config = compose_config([*BASE, *overrides, f"init_from={source}"], TRAIN)
    start, model = open_start(config), build(config)
    assert start is not None
    start.check(model, config, "{}")
    start.fill(model, CPU)
    return model


IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("method", ["sltrain", "low_rank", "full"])
def test_the_same_method_continues_with_the_same_bits(method: str, saved_run: Callable, lines: list[str]) -> None:
    source, model = saved_run(f"method={method}", "seed=1")
    found = started(source, f"method={method}", "seed=2").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert f"init from  {source}, step 7: all weights copied" in lines


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("overrides", [["method=low_rank"], ["method=maestro"], ["method=sltrain", "rank=4"]])
def test_ranks_that_maestro_has_cut_can_be_trained_again(
    overrides: list[str], is_whole: bool, saved_run: Callable
) -> None:
    """The function stays; no rank is zero in both factors. Some ranks of a layer are cut, or all."""

    def cut(model: LlamaForCausalLM) -> None:
        for _, layer in _layers(model):
            layer.kept = 0 if is_whole else 3
            layer.clear_cut()

    source, trained = saved_run("method=maestro", "method.max_rank=8", change=cut)
    if overrides == ["method=maestro"]:
        overrides = [*overrides, "method.max_rank=8"]
    if overrides == ["method=low_rank"]:
        overrides = [*overrides, "alpha=8"]  # maestro's scale
    model = started(source, *overrides)
    for name, layer in _layers(model):
        assert (layer.A.any(1) | layer.B.any(0)).all()
        theirs = trained.get_submodule(name).dense_weight()
        if "method=sltrain" not in overrides:  # S is not zero there
            torch.testing.assert_close(layer.dense_weight(), theirs, atol=1e-5, rtol=1e-5)


def test_the_share_of_a_guide_is_that_of_the_new_run(saved_run: Callable) -> None:
    def fade(model: LlamaForCausalLM) -> None:
        for module in model.modules():
            if hasattr(module, "share"):
                module.share.fill_(0.25)

    overrides = ["method=structured_ffn", "method.guided=true", "max_steps=20"]
    source, trained = saved_run(*overrides, change=fade)
    found = started(source, *overrides).state_dict()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(found[name], tensor) != name.endswith(".share")


@pytest.mark.parametrize("source_method", ["sltrain", "low_rank"])
def test_dense_training_begins_with_the_function_of_the_factors(source_method: str, saved_run: Callable) -> None:
    source, model = saved_run(f"method={source_method}")
    torch.testing.assert_close(started(source, "method=full")(IDS), model(IDS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("overrides", [["method=sltrain"], ["method=low_rank"], ["method=sltrain", "support=block"]])
def test_factors_begin_near_a_dense_matrix_and_the_log_says_how_near(
    overrides: list[str], saved_run: Callable, lines: list[str]
) -> None:
    source, model = saved_run("method=full")
    found, dense = started(source, *overrides), model.state_dict()
    errors = {}
    for name, layer in _layers(found):
        weight = dense[f"{name}.weight"]
        errors[name] = ((layer.dense_weight() - weight).norm() / weight.norm()).item()
        values = torch.linalg.svdvals(weight)
        assert errors[name] <= (values[8:].norm() / values.norm()).item() + 1e-5, "not above that of the rank alone"
    worst = max(errors, key=lambda name: errors[name])
    said = next(line for line in lines if line.startswith("init from"))
    assert "14 matrices approximated" in said and f"worst {errors[worst]:.4f} ({worst})" in said
    assert torch.equal(found.model.embed_tokens.weight, model.model.embed_tokens.weight)


NO_MATRIX = {
    "cola": ["method=cola"],
    "cr_net": ["method=cr_net"],
    "dlr": ["method=dlr", "method.activation=silu"],
    "lost": ["method=lost", "method.activation=silu", "sparsity=0.1"],
}


@pytest.mark.parametrize("kind", NO_MATRIX)
def test_what_is_no_matrix_continues_by_its_own_method_alone(
    kind: str, saved_run: Callable, lines: list[str], tmp_path: Path
) -> None:
    source, trained = saved_run(*NO_MATRIX[kind])
    model = started(source, *NO_MATRIX[kind])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())
    with pytest.raises(ValueError, match=f"its layers of kind {kind} are not one matrix each"):
        started(source, "method=low_rank")
    dense, _ = saved_run("method=full")
    with pytest.raises(ValueError, match=f"kind {kind}, which are not one matrix each, cannot start from a dense"):
        started(dense, *NO_MATRIX[kind])


def _layers(model: LlamaForCausalLM) -> list:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, ReplacedLinear)]


def test_another_rank_is_another_layer(saved_run: Callable, lines: list[str]) -> None:
    square = "model.num_key_value_heads=4"
    source, model = saved_run("method=sltrain", square)
    found = started(source, "method=sltrain", square, "rank=32", "sparsity=0.5")
    torch.testing.assert_close(found(IDS), model(IDS), atol=1e-4, rtol=1e-4)  # of full rank: exact but for rounding
    assert "14 matrices approximated" in lines[-1]


LLAMA3 = "model.tie_word_embeddings=true model.rope_scaling={rope_type:llama3,original_max_position_embeddings:16}"


@pytest.mark.parametrize(("is_tied", "how"), [(False, ""), (True, ""), (True, LLAMA3)])
def test_a_folder_of_transformers_gives_its_logits(is_tied: bool, how: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = asdict(RopeScaling("llama3", 8.0, 1.0, 4.0, 16)) if how else {"rope_type": "default"}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **shape,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            tie_word_embeddings=is_tied,
            rope_parameters={**rope, "rope_theta": 5000.0},
        )
    )
    theirs.save_pretrained(tmp_path / "hf")
    assert ("lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")) is not is_tied
    with pytest.raises(ValueError, match=r"rope_theta 5000.0, not 10000.0; type model.rope_theta=5000.0"):
        started(tmp_path / "hf", "method=full", *how.split())
    if how:
        with pytest.raises(ValueError, match=r"type model.rope_scaling.rope_type=llama3 model.rope_scaling.factor=8.0"):
            started(tmp_path / "hf", "method=full", "model.rope_theta=5000")
    if not is_tied:
        with pytest.raises(ValueError, match="type model.tie_word_embeddings=False"):
            started(tmp_path / "hf", "method=full", "model.rope_theta=5000", "model.tie_word_embeddings=true")
    model = started(tmp_path / "hf", "method=full", "model.rope_theta=5000", *how.split())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-4)


def change(folder: Path, **keys: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **keys}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as transformers writes it, of zeros."""
    config = compose_config([*BASE, "method=full"], TRAIN)
    model = build_model(config, VOCABULARY, torch.float32)
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    shape = {key: value for key, value in asdict(config.model).items() if key not in ("name", "vocab_size")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY, **shape}))
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_type": "qwen3"}, "type qwen3; a LLaMA is needed"),
        ({"attention_bias": True}, "attention_bias=True, which models here do not have"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"head_dim": 64}, "head_dim=64"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"hidden_size": 64}, "its config.json says"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05, not 1e-06; type model.rms_norm_eps=1e-05"),
    ],
)
def test_another_model_is_refused_in_one_line(keys: dict, words: str, folder: Path) -> None:
    assert torch.equal(started(folder, "method=full").lm_head.weight, torch.zeros(VOCABULARY, 32))
    change(folder, **keys)
    with pytest.raises(ValueError) as caught:
        started(folder, "method=full")
    assert str(caught.value).startswith(f"init_from={folder}") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_shape_or_vocabulary_names_the_keys_to_type(folder: Path, saved_run: Callable) -> None:
    with pytest.raises(ValueError, match=r"hidden_size 32, not 128, .* type model.hidden_size=32 model.intermediate_s"):
        open_start(compose_config(["model=llama_tiny", "data=stdlib", f"init_from={folder}"], TRAIN))
    with pytest.raises(ValueError, match=r"vocab_size 64, not 99; type model.vocab_size=64"):
        started(folder, "model.vocab_size=99")
    config = compose_config([*BASE, f"init_from={folder}", "tokenizer=gpt2"], TRAIN)
    start = open_start(config)
    assert start is not None
    with pytest.raises(ValueError, match="has 64 ids, this model 100 .*tokenizer=gpt2.* model.vocab_size=64"):
        start.check(build_model(config, 100, torch.float32), config, "{}")


def test_what_is_no_folder_of_weights_is_refused(tmp_path: Path) -> None:
    for name, words in (
        ("/nowhere/run", "there is no such folder here"),
        ("owner/model", "there is no such folder here; download a model of the Hub first: hf download owner/model"),
        (str(tmp_path), "holds neither a run"),
    ):
        with pytest.raises(ValueError, match=words):
            open_start(compose_config([*BASE, f"init_from={name}"], TRAIN))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no weights in safetensors"):
        open_start(compose_config([*BASE, f"init_from={tmp_path}"], TRAIN))
