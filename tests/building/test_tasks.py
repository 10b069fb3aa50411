"""What tasks ask of a model, beside tokenizers' own ids and a whole forward pass; and lm-eval's tasks of local files in
a run, where lm-eval is installed."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file

import sltrain
from sltrain.building import task_model
from sltrain.building import tasks as tasks_module
from sltrain.building.task_model import Prompt, TaskModel, Unanswered
from sltrain.building.tasks import Tasks, _numbers, _prompt
from sltrain.commands.evaluate import run_command as sltrain_eval
from sltrain.config import ModelConfig
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks
from sltrain.engine.in_step import InStep, Stopped
from sltrain.engine.sharded import Settings, Sharded
from sltrain.models.generation import Sampling
from sltrain.models.llama import LlamaForCausalLM

Run = Callable[..., tuple[int, str, str]]
ONE = Ranks(0, 1, torch.device("cpu"))
PAIRS = [
    ("def __init__(self", ", name):"),
    ("import ", "os"),  # the space belongs to the continuation
    ("", "return None"),
    ("   ", "x = 1"),
    ("class A:\n    def f(self):\n        return ", "1"),
    ("a b c d e f g h i j k l m n o p q r s t u v w x y z", " and so on until the context is full"),
]
TEXTS = ["return None", "def f(x):\n    return x\n" * 4]


@pytest.fixture
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file.read_text(), "test")


@pytest.fixture
def model() -> LlamaForCausalLM:
    """It reads 24 ids."""
    shape = ModelConfig("test", 32, 48, 2, 2, vocab_size=512, max_position_embeddings=24)
    made = LlamaForCausalLM(shape)
    made.init_weights(3)
    for parameter in made.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return made.requires_grad_(False)


def log_probability(model: LlamaForCausalLM, ids: list[int], num_scored: int) -> float:
    logits = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(len(ids) - num_scored, len(ids)))


def test_likelihoods_are_those_of_the_ids_of_the_whole_text(
    model: LlamaForCausalLM, tokenizer: Tokenizer, tokenizer_file: Path
) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    end = theirs.token_to_id("</s>")
    found = TaskModel(model, tokenizer, ONE, max_positions=50).likelihoods(PAIRS)
    for (context, continuation), likelihood in zip(PAIRS, found, strict=True):
        whole = theirs.encode(context + continuation).ids
        before = theirs.encode(context.rstrip()).ids
        ids = (whole if before else [end, *whole])[-25:]
        expected = log_probability(model, ids, len(whole) - len(before))
        assert likelihood.log_probability == pytest.approx(expected, abs=1e-4)


def test_a_text_longer_than_the_model_reads_is_scored_in_windows(
    model: LlamaForCausalLM, tokenizer: Tokenizer, tokenizer_file: Path
) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    found = TaskModel(model, tokenizer, ONE, max_positions=50).text_likelihoods(TEXTS)
    for text, likelihood in zip(TEXTS, found, strict=True):
        ids = theirs.encode(text).ids
        expected = log_probability(model, [theirs.token_to_id("</s>"), *ids[:24]], min(len(ids), 24))
        for begin in range(24, len(ids), 24):
            end = min(begin + 24, len(ids))
            expected += log_probability(model, ids[end - 25 : end], end - begin)
        assert likelihood == pytest.approx(expected, abs=1e-3)
    assert len(theirs.encode(TEXTS[1]).ids) > 24


def test_what_is_written_is_the_likeliest_text_up_to_an_end(
    model: LlamaForCausalLM, tokenizer: Tokenizer, tokenizer_file: Path
) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    ids = theirs.encode("def f(").ids
    start = len(ids)
    for _ in range(9):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert theirs.token_to_id("</s>") not in ids
    expected = theirs.decode(ids[start:])
    asked = TaskModel(model, tokenizer, ONE, max_positions=50)
    inner = expected[4:6]
    whole, cut = asked.continuations([Prompt("def f(", ends, 9, Sampling()) for ends in ((), (inner, "never"))])
    assert whole == expected and cut == expected[: expected.index(inner)]


def test_several_ranks_answer_as_one_does(
    model: LlamaForCausalLM, tokenizer: Tokenizer, on_two_ranks: Callable[..., list[Any]]
) -> None:
    def answers(ranks: Ranks) -> Any:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        asked = TaskModel(model, tokenizer, ranks, max_positions=30)
        if not ranks.is_main:
            return asked.serve()
        prompts = [Prompt(text[:9], ("\n",), 5, Sampling()) for text in TEXTS]
        found = asked.likelihoods(PAIRS), asked.text_likelihoods(TEXTS), asked.continuations(prompts)
        asked.done()
        return found

    alone = answers(ONE)
    for world_size in (2, 3):
        assert on_two_ranks(answers, world_size)[0] == alone


@pytest.mark.parametrize(("world_size", "reshards"), [(2, True), (3, False)])
def test_ranks_with_shards_answer_in_step(
    world_size: int,
    reshards: bool,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    on_two_ranks: Callable[..., list[Any]],
) -> None:
    """As one process; after an error of a rank between two passes too, and until one is asked to stop."""

    def answers(asked: TaskModel) -> list[Any]:
        prompts = [Prompt(text[:9], ("\n",), 5, Sampling()) for text in TEXTS]
        likelihoods = [value for one in asked.likelihoods(PAIRS) for value in one]
        return [*likelihoods, *asked.text_likelihoods(TEXTS[:1]), *asked.continuations(prompts)]

    def on_shards(ranks: Ranks) -> Any:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        strategy = Sharded(ranks, Settings(reshard_after_forward=reshards))
        strategy.shard(model, list(model.model.layers))
        two = torch.ones(1, 2, dtype=torch.int64)
        model(two, two)  # as a run evaluates perplexity first
        strategy.after_forward(model)
        bad = Prompt("b", None, 9, Sampling())  # type: ignore[arg-type]
        is_asked = list[int]()
        in_step = InStep(model.model, ranks, lambda: bool(is_asked) and ranks.rank == 1)
        asked = TaskModel(model, tokenizer, ranks, 30, in_step.should_stop, in_step=in_step)
        with torch.no_grad(), strategy.by_modules(model), in_step:
            if not ranks.is_main:
                asked.serve()  # up to the first `done`
                is_asked.append(1)
                asked.serve()
                return None
            found = answers(asked)
            with pytest.raises(Unanswered, match="rank 1: "):
                asked.continuations([Prompt("a", (), 9, Sampling()), bad])
            found = found, answers(asked)
            asked.done()
            with pytest.raises(Stopped):
                answers(asked)
            asked.done()
            return found

    alone = answers(TaskModel(model, tokenizer, ONE, 30))
    for found in on_two_ranks(on_shards, world_size)[0]:
        assert found == pytest.approx(alone, abs=1e-5)


def test_a_stop_of_any_rank_ends_the_questions_on_all(
    model: LlamaForCausalLM, tokenizer: Tokenizer, on_two_ranks: Callable[..., list[Any]]
) -> None:
    class Asking(Tasks):
        def __init__(self) -> None: ...

        def evaluate(self, model: TaskModel) -> Any:
            model.likelihoods(PAIRS)
            raise AssertionError("it was not stopped")

    def stopped(ranks: Ranks) -> Any:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        asked = TaskModel(model, tokenizer, ranks, 30, should_stop=lambda: ranks.rank == 1)
        return tasks_module.evaluate_tasks(Asking() if ranks.is_main else None, asked)

    assert on_two_ranks(stopped) == [None, None]
    with pytest.raises(Stopped):
        TaskModel(model, tokenizer, ONE, 30, should_stop=lambda: True).likelihoods(PAIRS)


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_of_one_rank_keeps_all_in_step(
    broken: int,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    on_two_ranks: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It costs that task its numbers and one line; the next one has those of a single process."""

    class Two(Tasks):
        limit = None

        def __init__(self) -> None:
            self._loaded = {"first": {}, "second": {}}

    def evaluate_one(lm: TaskModel, *_: Any) -> Any:
        found = [one.log_probability for one in lm.likelihoods(PAIRS)]
        return {f"task_{len(asked)}": {"sum,none": sum(found)}}

    asked = list[int]()
    monkeypatch.setattr(tasks_module, "_answering", lambda model: model)
    monkeypatch.setattr(tasks_module, "_evaluate", evaluate_one)

    def evaluated(ranks: Ranks) -> Any:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        said = list[str]()
        tasks_module.logger.warning = said.append  # type: ignore[method-assign]
        original = task_model.score

        def score(*arguments: Any) -> Any:
            asked.append(0)
            if len(asked) == 1 and ranks.rank == broken and ranks.world_size > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
            return original(*arguments)

        task_model.score = score
        found = tasks_module.evaluate_tasks(
            Two() if ranks.is_main else None, TaskModel(model, tokenizer, ranks, max_positions=30)
        )
        task_model.score = original
        return found, said

    ranks = on_two_ranks(evaluated)
    (numbers, said), (same, silent) = ranks
    alone = sum(one.log_probability for one in TaskModel(model, tokenizer, ONE, 30).likelihoods(PAIRS))
    assert numbers == same and list(numbers.values()) == [{"sum": alone}]
    assert silent == [] and said == [
        f"task first could not be evaluated (rank {broken}: OutOfMemoryError: CUDA out of memory. Tried);"
        " its numbers are left out"
    ]


def test_what_lm_eval_asks_and_counts_is_read() -> None:
    greedy = _prompt("Q:", {"until": "\n", "max_gen_toks": 7, "do_sample": False, "temperature": 0.0})
    assert greedy == Prompt("Q:", ("\n",), 7, Sampling())
    drawn = _prompt("Q:", {"until": ["A", ""], "do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert (drawn.until, drawn.max_new_tokens, drawn.sampling.temperature, drawn.sampling.top_p) == (
        ("A",),
        256,
        0.5,
        0.9,
    )
    raw = {
        "alias": "x",
        "acc,none": np.float64(0.5),
        "acc_stderr,none": "N/A",
        "exact_match,strict": 1,
        "sample_len": 9,
    }
    assert _numbers(raw) == {"acc": 0.5, "exact_match/strict": 1.0}


def test_without_the_package_it_is_one_line(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    find = tasks_module.importlib.util.find_spec
    monkeypatch.setattr(
        tasks_module.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    code, _, err = sltrain_train(*tiny, "eval_tasks=[piqa]", f"run_dir={tmp_path}/run")
    assert code == 2 and "pip install lm-eval" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--limit", "3"], "--limit 3 is for --tasks"),
        (["--tasks", ","], "names no task"),
        (["--tasks", "piqa", "--path", "x.txt"], "--path is for text"),
    ],
)
def test_flags_that_do_not_go_together(typed: list[str], said: str, capfd: pytest.CaptureFixture) -> None:
    assert sltrain_eval(["nowhere", *typed]) == 2
    assert said in capfd.readouterr().err


# ---- with lm-eval


@pytest.fixture
def yaml_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Tasks over files here: which line follows, and how likely are texts."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = Path(random.__file__).read_text().splitlines()
    lines = [line for line in lines if len(line.strip()) > 20]
    asked = [
        {"question": lines[i], "choices": [lines[i + 1], lines[i + 40], lines[i + 80]], "answer": 0}
        for i in range(0, 200, 10)
    ]
    texts = [{"text": "\n".join(lines[i : i + 12])} for i in range(0, 60, 20)]
    common = "dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
    kinds = {
        "choice": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        'doc_to_target: answer\ntarget_delimiter: "\\n"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
        "text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: text\n'
        "metric_list: [{metric: bits_per_byte}]\n",
    }
    made = {}
    for name, docs in (("choice", asked), ("text", texts)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        made[name] = tmp_path / f"{name}.yaml"
        made[name].write_text(f"task: my_{name}\n" + common.format(file=file) + kinds[name])
    return made


@pytest.mark.slow
def test_a_run_evaluates_tasks_and_trains_as_without(
    tiny: list[str],
    tmp_path: Path,
    yaml_files: dict[str, Path],
    sltrain_train: Run,
    metrics_of: Callable[[Path], list[dict]],
    capfd: pytest.CaptureFixture,
) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    names = [str(path) for path in yaml_files.values()]
    options = ["eval_every=3", "ema=0.5", "model.initializer_range=0.2"]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    code, out, err = sltrain_train(*tiny, *options, f"eval_tasks=[{','.join(names)}]", f"run_dir={run}")
    assert code == 0, err
    assert (states[0], states[1]) == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert "tasks      my_choice 20, my_text 3 documents, by lm-eval" in out and "tasks at step 6: my_choice acc" in err
    evaluated = [line for line in metrics_of(run) if line["event"] in ("eval", "final")]
    assert [line["step"] for line in evaluated] == [3, 6]
    numbers = evaluated[-1]["tasks"]
    assert numbers.keys() == {"my_choice", "my_text"} and numbers["my_choice"].keys() >= {
        "acc",
        "acc_stderr",
        "acc_norm",
    }

    assert sltrain_train(*tiny, *options, f"run_dir={plain}")[0] == 0
    assert [line["loss"] for line in metrics_of(plain) if "loss" in line] == [
        line["loss"] for line in metrics_of(run) if "loss" in line
    ]
    weights, same = (load_file(folder / "checkpoints/step_00000006/model.safetensors") for folder in (run, plain))
    assert all(torch.equal(weights[name], same[name]) for name in weights)

    # The averaged weights, by the other door, and by hand.
    assert sltrain.evaluate(run, tasks=names) == {"tasks": numbers, "step": 6}
    assert sltrain_eval([str(run), "--tasks", names[0], "--limit", "5", "--json"]) == 0
    capfd.readouterr()
    model = sltrain.load(run)
    tokenizer = Tokenizer((run / "tokenizer.json").read_text(), "run")
    asked = TaskModel(model, tokenizer, ONE, 200)
    documents = [json.loads(line) for line in (tmp_path / "choice.jsonl").read_text().splitlines()]
    hits = []
    for document in documents:
        found = asked.likelihoods([(document["question"], f"\n{choice}") for choice in document["choices"]])
        hits.append(int(np.argmax([likelihood.log_probability for likelihood in found])) == document["answer"])
    assert numbers["my_choice"]["acc"] == pytest.approx(np.mean(hits))
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    bits = -sum(asked.text_likelihoods(texts)) / np.log(2) / sum(len(text.encode()) for text in texts)
    assert numbers["my_text"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.yaml", "nowhere.yaml is no file"),
        ("gone", "cannot be opened.*gone.jsonl.*check its YAML file"),
        ("damaged", "cannot be opened.*check its YAML file"),
        ("unknown_metric", "cannot be"),
    ],
)
def test_a_task_that_cannot_be_had_is_one_line(
    name: str, said: str, yaml_files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    text = yaml_files["choice"].read_text()
    texts = {
        "gone": text.replace("choice.jsonl", "gone.jsonl"),
        "damaged": text + "metric_list: [",
        "unknown_metric": text.replace("metric: acc}", "metric: no_such_metric}"),
    }
    path = tmp_path / f"{name}.yaml" if name in texts else name
    if name in texts:
        Path(path).write_text(texts[name])
    with pytest.raises(ValueError, match=said) as raised:
        Tasks([str(path)], None)
    assert str(raised.value).startswith("eval_tasks: ") and len(str(raised.value).splitlines()) == 1


@pytest.mark.slow
def test_a_name_that_lm_eval_does_not_know(yaml_files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="knows no task 'hellaswagg'; did you mean .*hellaswag"):
        Tasks(["hellaswagg"], None)
