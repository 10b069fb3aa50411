"""`sltrain-plan` prints a table or one JSON object, touches no GPU, refuses what it cannot plan with one line, and
gives the figures that were promised."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain.api.plan import Plan, build_plan
from sltrain.api.plan_config import CARDS, PlanConfig, read_arguments, split_arguments
from sltrain.commands.plan import run_command
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.planning.memory_plan import GROUPS

Run = Callable[..., tuple[int, str, str]]

TINY = ["model=llama_tiny", "model.vocab_size=500", "global_batch_size=4", "micro_batch_size=4", "seq_len=32"]
# Embedding, head and norms; A and B; the values of S of 512 x 512 and 512 x 1376 matrices
NUM_SPARSE_60M = 8 * (4 * int(0.03 * 512 * 512) + 3 * int(0.03 * 512 * 1376))
NUM_PARAMETERS_60M = (2 * 32_000 + 17) * 512 + 8 * 128 * (4 * 1024 + 3 * 1888) + NUM_SPARSE_60M
ON_ONE_CARD = "optimizer=adam8bit per_layer_update=true"


@pytest.fixture
def sltrain_plan(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_command(list(arguments))
        out, err = capfd.readouterr()
        return int(code), out, err

    return run


@pytest.fixture
def planned_object(sltrain_plan: Run) -> Callable[..., dict[str, Any]]:
    """The object of format=json."""

    def run(*arguments: str) -> dict[str, Any]:
        code, out, err = sltrain_plan(*arguments, "format=json")
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    return run


def plan(arguments: str) -> Plan:
    return build_plan(*read_arguments(arguments.split()))


def gigabytes(arguments: str) -> float:
    """Of the run itself, planned for CUDA and bfloat16 unless the arguments say otherwise."""
    result = plan(arguments)
    where = "cuda, bfloat16"
    assert where in result.headline
    return result.columns[0].total_bytes / 1e9


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


# ---- the figures


def batch(size: int) -> str:
    return f"global_batch_size={size} micro_batch_size={size}"


def test_seven_billion_on_one_card() -> None:
    """3.14e9 values: bfloat16 weights, 8-bit moments and the head's gradient alone are 12.9 GB."""
    plain = gigabytes(f"model=llama_7b {ON_ONE_CARD} {batch(1)}")
    assert plain <= 15.2 and plain == pytest.approx(14.8, rel=0.02)
    assert gigabytes(f"model=llama_7b {ON_ONE_CARD} {batch(1)} activation_checkpointing=true") <= 14.0
    assert 14.0 < gigabytes(f"model=llama_7b {ON_ONE_CARD} {batch(16)} activation_checkpointing=true") <= 15.2


def test_seven_billion_with_nearly_no_state() -> None:
    arguments = "optimizer=scale per_layer_update=true support=stratified activation_checkpointing=true"
    total = gigabytes(f"model=llama_7b {arguments} {batch(1)}")
    assert 6.9 < total <= 7.5  # 3.14e9 values of 2 bytes, positions of one byte, momentum of the head: 6.9


@pytest.mark.parametrize(("size", "least", "most"), [("1b", 2.6, 4.0), ("350m", 0.8, 1.5)])
def test_smaller_models_on_one_card(size: str, least: float, most: float) -> None:
    assert least < gigabytes(f"model=llama_{size} {ON_ONE_CARD} {batch(1)}") <= most


@pytest.mark.parametrize(("size", "billions"), [("13b", 13.0), ("30b", 32.5), ("70b", 65.3)])
def test_larger_models_can_be_planned(size: str, billions: float) -> None:
    """A dense model has as many parameters as its name says, or, for LLaMA 1 and 2, as Meta counts."""
    result = plan(f"model=llama_{size} max_steps=1 cards=[80]")
    this, dense = result.columns[:2]
    assert dense.num_parameters / 1e9 == pytest.approx(billions, rel=0.08)
    assert this.num_parameters < 0.6 * dense.num_parameters
    assert 4 * this.num_parameters < this.total_bytes < dense.total_bytes
    assert not result.fits(dense)["80GB"]


@pytest.mark.parametrize(
    ("size", "sltrain", "dense", "galore", "millions"),
    [
        ("60m", 0.267, 0.35, 0.28, "43.5"),
        ("130m", 0.600, 0.81, 0.61, "96.6"),
        ("350m", 1.238, 2.21, None, "194.3"),
        ("1b", 4.163, 8.04, 4.76, "645.6"),
    ],
)
def test_the_papers_own_count(size: str, sltrain: float, dense: float, galore: float | None, millions: str) -> None:
    columns = {column.name: column for column in plan(f"model=llama_{size} paper_convention=true").columns}
    total = {name: column.total_bytes / 1e9 for name, column in columns.items()}
    assert round(total["this run"], 3) == sltrain
    assert total["method=full"] == pytest.approx(dense, abs=0.006)
    if galore is not None:
        assert round(total["method=full optimizer=galore"], 2) == galore
    assert columns["this run"].paper_millions == millions


# ---- what is printed


def test_a_table(sltrain_plan: Run) -> None:
    code, out, err = sltrain_plan("model=llama_1b", "cards=[24,h100,0.001]")
    assert (code, err) == (0, "")
    head, empty, names, rule, more, *rest = out.splitlines()
    assert head.startswith("llama_1b, sltrain, cuda, bfloat16, 32 x 256 tokens; highest during") and empty == ""
    assert cells(names)[1:] == ["this run", "method=full", "method=full", "published SLTrain"]
    assert cells(more) == ["", "", "", "optimizer=galore", ""]
    assert set(rule) <= set("|-: ")
    rows = {cells(line)[0]: cells(line)[1:] for line in rest if line.startswith("|")}
    numbers = {group.replace("_", " ") for group in GROUPS} & set(rows)
    for i, total in enumerate(map(float, rows["total"])):
        assert sum(float(rows[name][i]) for name in numbers) == pytest.approx(total, abs=0.0005 * (len(numbers) + 1))
    assert {"dense weights", "indices", "optimizer state", "activations"} <= numbers
    assert "ddp buckets" not in rows  # nobody has any
    assert rows["parameters"][:2] == ["645.5M", "1339.1M"]
    assert rows["fits 0.001GB"] == ["no"] * 4 and rows["fits h100"] == ["yes"] * 4
    assert rows["fits 24GB"][0] == "yes"
    assert any(line.startswith("note: published SLTrain") for line in rest)


def test_json_is_the_last_line(sltrain_plan: Run) -> None:
    code, out, err = sltrain_plan("model=llama_60m", "format=json", "cards=[24,h100]", "compile=true")
    assert code == 0 and len(out.splitlines()) == 1
    answer = json.loads(out)
    assert set(answer["groups"]) == set(GROUPS)
    assert sum(answer["groups"].values()) == answer["total_bytes"] > 1e9
    assert answer["num_parameters"] == NUM_PARAMETERS_60M
    assert answer["fits"] == {"24GB": True, "h100": True}
    assert set(answer["compared"]) == {"method=full", "method=full optimizer=galore", "published SLTrain"}
    for other in answer["compared"].values():
        assert sum(other["groups"].values()) == other["total_bytes"] and set(other["fits"]) == {"24GB", "h100"}
    assert answer["compared"]["method=full"]["num_parameters"] == 58_073_600
    notes = err.splitlines()
    assert len(notes) == 3 and all(note.startswith("note: ") for note in notes) and "compile=true" in notes[0]


def test_table_and_json_say_the_same(sltrain_plan: Run, planned_object: Callable[..., dict[str, Any]]) -> None:
    answer = planned_object("model=llama_130m")
    _, out, _ = sltrain_plan("model=llama_130m")
    printed = {cells(line)[0]: cells(line)[1] for line in out.splitlines() if line.startswith("|")}
    assert printed["total"] == f"{answer['total_bytes'] / 1e9:.3f}"
    shown = {group: value for group, value in answer["groups"].items() if value}
    assert {group: printed[group.replace("_", " ")] for group in shown} == {
        group: f"{value / 1e9:.3f}" for group, value in shown.items()
    }


def test_what_fits_is_what_is_left_of_the_card(planned_object: Callable[..., dict[str, Any]]) -> None:
    total = planned_object(*TINY)["total_bytes"]
    for reserve in (0.0, 0.25):
        exact = (total + reserve * 1e9) / 2**30
        sizes = f"cards=[{exact * 1.0001:.8f},{exact * 0.9999:.8f}]"
        answer = planned_object(*TINY, sizes, f"reserve_gb={reserve}")
        assert list(answer["fits"].values()) == [True, False]


@pytest.mark.parametrize("method", ["sltrain", "low_rank", "full"])
def test_columns_of_a_method(method: str, planned_object: Callable[..., dict[str, Any]]) -> None:
    answer = planned_object(*TINY, f"method={method}")
    names = {"sltrain": {"method=full", "published SLTrain"}, "low_rank": {"method=full"}, "full": set()}[method]
    assert set(answer["compared"]) == names | {"method=full optimizer=galore"}
    if method != "full":
        dense = planned_object(*TINY, "method=full")
        assert answer["compared"]["method=full"]["total_bytes"] == dense["total_bytes"]


def test_the_published_layout_keeps_more(planned_object: Callable[..., dict[str, Any]]) -> None:
    answer = planned_object("model=llama_60m")
    published = answer["compared"]["published SLTrain"]
    values = answer["groups"]["sparse_values"] // 2
    assert published["groups"]["indices"] == 8 * values > 3 * answer["groups"]["indices"] > 0
    assert published["num_parameters"] == answer["num_parameters"]


def test_a_card_is_meant_unless_the_cpu_is_asked_for(sltrain_plan: Run) -> None:
    def where(*arguments: str) -> str:
        return sltrain_plan(*TINY, *arguments)[1].splitlines()[0]

    assert ", cuda, bfloat16, 4 x 32" in where() == where("device=cuda") == where("device=auto")
    assert ", cuda, float32, " in where("dtype=float32")
    assert ", cpu, float32, " in where("device=cpu")
    assert ", cpu, bfloat16, " in where("device=cpu", "dtype=bfloat16")


# ---- lists of values


def test_a_column_for_each_optimizer(planned_object: Callable[..., dict[str, Any]]) -> None:
    """Each is what the run of that name alone is planned at, of every optimizer that there is and takes something."""
    names = [name for name in OPTIMIZERS.names() if OPTIMIZERS.is_built_in(name)]
    base = ["model=llama_60m", "method=full"]
    answer = planned_object(*base, f"optimizer={','.join(names)}")
    columns = {answer["name"]: answer, **answer["compared"]}
    assert set(columns) == {f"optimizer={name}" for name in names} - {"optimizer=spectron", "optimizer=scaled_adamw"}
    for name in ("galore", "scale", "muon", "adam8bit"):
        alone = planned_object(*base, f"optimizer={name}")
        assert alone["groups"] == columns[f"optimizer={name}"]["groups"]
    state = {name: column["groups"]["optimizer_state"] for name, column in columns.items()}
    assert (
        state["optimizer=scale"] < state["optimizer=apollo_mini"] < state["optimizer=galore"] < state["optimizer=adamw"]
    )


def test_galores_state_from_the_shapes(planned_object: Callable[..., dict[str, Any]]) -> None:
    """60M, bfloat16, rank 128: P and two moments of q, k, v, o (512 x 512) and gate, up, down (1376 x 512); AdamW's
    moments of embedding, head and norms, and its step counts."""
    answer = planned_object("model=llama_60m", "method=full", "optimizer=adamw,galore")
    matrices = 8 * 128 * (4 * (512 + 2 * 512) + 3 * (512 + 2 * 1376))
    others = (2 * 32_000 + 17) * 512
    state = answer["compared"]["optimizer=galore"]["groups"]["optimizer_state"]
    assert state == 2 * matrices + 4 * others + 4 * 19


def test_every_combination_is_a_column(sltrain_plan: Run, planned_object: Callable[..., dict[str, Any]]) -> None:
    """What could not be trained is none, and a note says why; more than six are shown below each other."""
    lists = ["method=full,sltrain,low_rank", "optimizer=adamw,scale,spectron", "rank=16"]
    expected = [
        f"method={m} optimizer={o}" for m in ("full", "sltrain", "low_rank") for o in ("adamw", "scale", "spectron")
    ]
    expected.remove("method=full optimizer=spectron")
    answer = planned_object(*TINY, *lists)
    assert [answer["name"], *answer["compared"]] == expected
    code, out, err = sltrain_plan(*TINY, *lists)
    assert (code, err) == (0, "")
    rows = [cells(line) for line in out.splitlines() if line.startswith("|")]
    heads = [i for i, row in enumerate(rows) if row[0].startswith("GB")]
    shown = [f"{m} {o}" for i in heads for m, o in zip(rows[i][1:], rows[i + 2][1:], strict=True)]
    assert shown == expected and len(heads) == 2
    totals = [float(cell) for row in rows if row[0] == "total" for cell in row[1:]]
    assert totals == [round(each["total_bytes"] / 1e9, 3) for each in (answer, *answer["compared"].values())]
    notes = [line for line in out.splitlines() if line.startswith("note: no column")]
    assert len(notes) == 1
    assert "method=full optimizer=spectron, sltrain-train would refuse: optimizer=spectron takes none" in notes[0]
    assert out.splitlines()[0].startswith("llama_tiny, cuda, bfloat16, 4 x 32 tokens")  # without the method


def test_a_note_names_the_columns_that_it_is_for(sltrain_plan: Run) -> None:
    _, out, _ = sltrain_plan(*TINY, "optimizer=adamw,scale", "compile=true")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert any(note.startswith("note: optimizer=adamw: bfloat16 second moments") for note in notes)
    assert any(note.startswith("note: compile=true") for note in notes) and len(notes) == 2


def test_combinations_that_exclude_each_other(sltrain_plan: Run) -> None:
    code, out, err = sltrain_plan(*TINY, "method=switchlora", "optimizer=adamw,adam8bit", "rank=8")
    assert (code, err) == (
        0,
        "",
    ) and "no column optimizer=adam8bit, sltrain-train would refuse: method=switchlora" in out


def test_the_paper_counts_listed_optimizers(planned_object: Callable[..., dict[str, Any]]) -> None:
    answer = planned_object("model=llama_60m", "paper_convention=true", "method=full", "optimizer=adamw,galore")
    total = answer["compared"]["optimizer=galore"]["total_bytes"]
    assert round(answer["total_bytes"] / 1e9, 2) == 0.35 and round(total / 1e9, 2) == 0.28


def test_a_comparison_that_cannot_be_trained_is_named(sltrain_plan: Run) -> None:
    """Dense weights hold no pairs of factors."""
    code, out, _ = sltrain_plan(*TINY, "optimizer=spectron", "rank=8")
    assert code == 0 and "note: no column method=full, sltrain-train would refuse: optimizer=spectron takes none" in out


# ---- settings


def test_several_processes(planned_object: Callable[..., dict[str, Any]]) -> None:
    alone = planned_object("model=llama_60m", "micro_batch_size=64")
    ddp = planned_object("model=llama_60m", "micro_batch_size=64", "num_processes=8")
    assert alone["groups"]["ddp_buckets"] == 0 < ddp["groups"]["ddp_buckets"]
    assert ddp["groups"]["gradients"] == 0


def test_what_processes_send(sltrain_plan: Run, planned_object: Callable[..., dict[str, Any]]) -> None:
    """DDP sums float32 gradients in a ring: 2 (n - 1) / n times their bytes. One process sends nothing."""
    both = [*TINY, "method=full", "dtype=float32", "num_processes=4", "global_batch_size=16"]
    answer = planned_object(*both, "bandwidth=0.5", "peak_tflops=2")
    sent, seconds = 2 * 3 / 4 * 4 * answer["num_parameters"], answer["traffic"]["seconds"]
    assert answer["traffic"]["all_reduce_bytes"] == answer["traffic"]["total_bytes"] == sent
    assert seconds == sent / 0.5e9 > answer["traffic"]["compute_seconds"] > 0
    for more, words in (
        ([], "bandwidth= (GB/s a process) says"),
        (["bandwidth=0.5"], f"{seconds:.3g} s at bandwidth=0.5 GB/s; peak_tflops="),
        (["bandwidth=0.5", "peak_tflops=2"], "times as long, so communication decides the speed"),
        (["bandwidth=5000", "peak_tflops=2"], "% of it, which can be hidden"),
    ):
        _, out, _ = sltrain_plan(*both, *more)
        (line,) = [line for line in out.splitlines() if "an update sends" in line]
        assert f"{sent / 1e9:.2f} GB from each process (all-reduce" in line and words in line
    assert "traffic" not in planned_object(*TINY)


def test_seventy_billion_on_sixteen_cards() -> None:
    """33e9 trained values in bfloat16 with gradients and two moments are 17 GB in sixteenths, and S's positions 6.9."""
    result = plan("model=llama_70b num_processes=16 cards=[40,80] bandwidth=50 peak_tflops=989")
    columns = {column.name: column for column in result.columns}
    assert not result.fits(columns["this run"])["80GB"]
    assert 24 < columns["parallel=fsdp"].total_bytes / 1e9 < 36
    assert any(note.startswith("fits 40GB, 80GB with parallel=fsdp:") for note in result.notes)
    cut = plan("model=llama_70b num_processes=16 parallel=fsdp cards=[80]")
    assert cut.total_bytes == columns["parallel=fsdp"].total_bytes and "1/16 of every weight" in cut.headline
    assert cut.traffic is not None and cut.traffic["all_reduce_bytes"] == 0 < cut.traffic["reduce_scatter_bytes"]


def test_what_shards_refuse(sltrain_plan: Run) -> None:
    for more, words in (
        (["parallel=hsdp", "parallel.replicas=3"], "parallel.replicas=3"),
        (["optimizer=lion", "stochastic_rounding=true"], "optimizer=adamw"),
    ):
        code, out, err = sltrain_plan(*TINY, "parallel=fsdp", "num_processes=4", *more)
        assert code == 2 and words in err and len(err.splitlines()) == 1, err


NOTES = {
    "global_batch_size=10 micro_batch_size=4": ["global_batch_size=10", "micro_batch_size=4"],
    "global_batch_size=4 num_processes=3": ["x 3"],
    "global_batch_size=8 per_layer_update=true": ["2 micro-batches", "global_batch_size=4"],
    "compile=true": ["compile=true"],
    "per_layer_update=true grad_clip=1.0": ["refuse", "grad_clip=1.0"],
    "stochastic_rounding=true dtype=float32": ["refuse", "stochastic_rounding"],
}


@pytest.mark.parametrize("arguments", NOTES)
def test_notes(arguments: str, sltrain_plan: Run) -> None:
    code, out, err = sltrain_plan(*TINY, *arguments.split())
    assert code == 0, err
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert any(all(word in note for word in NOTES[arguments]) for note in notes), notes
    _, plain, _ = sltrain_plan(*TINY)
    assert sum(line.startswith("note: ") for line in plain.splitlines()) == 2  # bfloat16 moments; published SLTrain


def test_no_gpu_is_touched(monkeypatch: pytest.MonkeyPatch, planned_object: Callable[..., dict[str, Any]]) -> None:
    expected = planned_object("model=llama_60m")

    def touched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("torch.cuda was asked")

    for name in (
        "is_available",
        "mem_get_info",
        "device_count",
        "current_device",
        "get_device_properties",
        "get_device_name",
        "init",
        "_lazy_init",
        "is_bf16_supported",
        "max_memory_allocated",
    ):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert planned_object("model=llama_60m") == expected
    assert planned_object("model=llama_60m", "device=cuda", "num_processes=4", "per_layer_update=true")["total_bytes"]
    assert planned_object("model=llama_60m", "paper_convention=true")["total_bytes"]


def test_measured_beside_the_plan(sltrain_plan: Run, planned_object: Callable[..., dict[str, Any]]) -> None:
    arguments = [*TINY, "device=cpu", "measure=true", "seq_len=128"]
    answer = planned_object(*arguments)
    assert answer["measured_bytes"] == pytest.approx(answer["total_bytes"], rel=0.1)
    code, out, _ = sltrain_plan(*arguments)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("| measured here"))
    assert cells(line)[1] == f"{answer['measured_bytes'] / 1e9:.3f}" and set(cells(line)[2:]) == {""}
    assert "measured_bytes" not in planned_object(*TINY)


def test_the_papers_count_as_json(planned_object: Callable[..., dict[str, Any]]) -> None:
    answer = planned_object("model=llama_60m", "paper_convention=true")
    assert answer["paper_millions"] == 43.5
    assert set(answer["groups"]) == {"parameters", "indices", "optimizer_state"}
    step_counts = 4 * (8 * (7 * 3 + 2) + 3)  # AdamW's of each tensor: A, B, values, norms; embedding, last norm, head
    expected = 6 * NUM_PARAMETERS_60M + 8 * NUM_SPARSE_60M + step_counts
    assert sum(answer["groups"].values()) == answer["total_bytes"] == expected


def test_vocabulary_from_a_tokenizer(planned_object: Callable[..., dict[str, Any]], tokenizer_file: Path) -> None:
    sizes = {}
    for name, argument in {
        "file": f"tokenizer={tokenizer_file}",
        "bpe": "tokenizer=bpe:512",
        "folder": f"tokenizer={tokenizer_file.parent}",
        "key": "model.vocab_size=512",
    }.items():
        sizes[name] = planned_object("model=llama_tiny", argument)["num_parameters"]
    assert len(set(sizes.values())) == 1, sizes


# ---- what cannot be planned

# (arguments, words the message must hold)
BAD: dict[str, tuple[list[str], list[str]]] = {
    "unknown card": (["cards=[h1000]"], ["h1000", "h100", "GiB"]),
    "no cards": (["cards=[]"], ["cards=[]", "cards=[24]"]),
    "negative reserve": (["reserve_gb=-1"], ["reserve_gb=-1", "0 or more"]),
    "no bandwidth": (["num_processes=2", "bandwidth=0"], ["bandwidth=0", "above 0", "bandwidth=50"]),
    "bandwidth of one process": (["bandwidth=50"], ["bandwidth=50", "num_processes="]),
    "no processes": (["num_processes=0"], ["num_processes=0", "at least 1"]),
    "unknown key": (["rnk=3"], ["rnk", "rank"]),
    "unknown model": (["model=llama_6m"], ["llama_6m", "llama_60m"]),
    "negative batch": (["micro_batch_size=-1"], ["micro_batch_size=-1", "at least 1"]),
    "empty rows": (["seq_len=0"], ["seq_len=0", "at least 2"]),
    "unknown method": (["method=sl_train"], ["method=sl_train", "sltrain"]),
    "measure the paper's count": (["measure=true", "paper_convention=true"], ["measure", "paper_convention", "drop"]),
    "measure many processes": (["measure=true", "num_processes=2"], ["measure=true", "num_processes"]),
    "no vocabulary": (["model.vocab_size=null", "tokenizer=t5-base"], ["model.vocab_size", "t5-base"]),
    "broken tokenizer": (["model.vocab_size=null", "tokenizer=/etc/hostname"], ["/etc/hostname", "tokenizer.json"]),
    "bpe without a size": (["model.vocab_size=null", "tokenizer=bpe:x"], ["bpe:x", "model.vocab_size"]),
    "sweep": (["--multirun"], ["--multirun", "KEY=VALUE"]),
    "sweep, short": (["-m"], ["-m", "KEY=VALUE"]),
    "measure several": (["measure=true", "rank=8,16"], ["measure=true", "2 are listed"]),
    "several cards": (["cards=24,80"], ["cards=24,80"]),
    "a name in a list": (["optimizer=adamw,galor"], ["optimizer=galor", "galore"]),
    "one value of a list": (["rank=8,9999"], ["9999", "q_proj"]),
    "takes nothing": (["optimizer=galore", "rank=16"], ["optimizer=galore takes none", "set optimizer.rank below 16"]),
    "all take nothing": (["optimizer=galore,apollo", "rank=16"], ["optimizer=galore", "takes none"]),
    "pairs in dense": (["method=full", "optimizer=spectron"], ["optimizer=spectron takes none"]),
    "excluded": (
        ["method=switchlora", "optimizer=adam8bit,galore", "rank=8"],
        ["method=switchlora", "optimizer=adam8bit"],
    ),
    "wrong type": (["num_processes=two"], ["num_processes=two", "Integer"]),
    "no truth value": (["measure=maybe"], ["measure=maybe"]),
    "format": (["format=yaml"], ["format=yaml", "table, json"]),
    "rank above the matrix": (["rank=129"], ["129", "128", "q_proj"]),
    "heads": (["model.num_attention_heads=3"], ["num_attention_heads 3"]),
    "row too long": (["seq_len=2048"], ["seq_len=2048", "max_position_embeddings"]),
    "no GPU": (["measure=true", "device=cuda"], ["device=cuda", "device=cpu"]),
    "no equals sign": (["card"], ["key=value"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, sltrain_plan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, words = BAD[case]
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    base = [text for text in TINY if text.partition("=")[0] not in {text.partition("=")[0] for text in arguments}]
    code, out, err = sltrain_plan(*base, *arguments)
    assert code == 2, err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert out == "" and list(tmp_path.iterdir()) == []
    for word in words:
        assert word in err


def test_no_model(sltrain_plan: Run) -> None:
    code, out, err = sltrain_plan()
    assert code == 2 and out == "" and "model=NAME" in err and len(err.splitlines()) == 1


def test_a_fault_of_ours_is_no_bad_input(sltrain_plan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr("sltrain.api.plan.build_plan", broken)
    code, out, err = sltrain_plan(*TINY)
    assert code == 1 and out == "" and "Traceback" in err


def test_help_explains_every_key(sltrain_plan: Run) -> None:
    code, out, _ = sltrain_plan("--help")
    assert code == 0
    for item in fields(PlanConfig):
        line = next(line for line in out.splitlines() if line.strip().startswith((f"{item.name}=", f"{item.name} ")))
        assert len(line.split()) > 2, line


def test_every_key_is_read() -> None:
    package = Path(__file__).resolve().parents[2] / "sltrain"
    text = "".join(path.read_text() for path in [package / "commands" / "plan.py", *package.glob("api/plan*.py")])
    assert not [item.name for item in fields(PlanConfig) if f".{item.name}" not in text]


def test_every_named_card_can_be_asked_for(planned_object: Callable[..., dict[str, Any]]) -> None:
    answer = planned_object(*TINY, f"cards=[{','.join(CARDS)}]")
    assert list(answer["fits"]) == list(CARDS) and all(answer["fits"].values())


def test_arguments_go_to_the_command_that_knows_them() -> None:
    own, others = split_arguments(["model=llama_60m", "cards=[24]", "seq_len=32", "measure=true", "max_steps=3"])
    assert own == ["cards=[24]", "measure=true"]
    assert others == ["model=llama_60m", "seq_len=32", "max_steps=3"]
