"""Every way of training, 20 updates each, against the losses that were recorded in golden.json.

A change that is to leave the numbers alone leaves these alone: on the machine of the file to the last bit, elsewhere
nearly. A change that means to alter them says so, and records them anew (on one machine, all of them):

    python tests/test_golden.py --write

`--write NAME ...` records only runs of these names, new ones say, and needs the machine of the file.
"""

import json
import sys
import time
from pathlib import Path

import pytest
from recorded import NUM_PIECES, TEXT, TOLERANCES, differences, dump, is_coarse, machine, train_anew, train_apart

from sltrain.optim.kinds.base import OPTIMIZERS

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("golden.json")

BASE = [
    "model=llama_tiny",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    *TEXT,
    "seq_len=32",
    "global_batch_size=8",
    "micro_batch_size=8",
    "max_steps=20",
    "warmup_steps=4",
    "lr=0.01",
    "log_every=1",
    "eval_every=0",
    "checkpoint_every=0",
    "device=cpu",
    "memory_guard=false",
]
assert NUM_PIECES * 64 >= 4096  # embeddings have 8-bit moments; smaller tensors have not
FULL = ["method=full", "lr=0.003"]  # above that a rounding error grows until nothing compares
SPARSE = ["method=sltrain", "rank=16", "sparsity=0.06"]
FACTORED = [*SPARSE, "layer_path=factored"]
IN_BACKWARD = ["per_layer_update=true", "grad_clip=null"]
TWO = ["micro_batch_size=4"]
SUPPORTS = ("uniform", "stratified", "block", "column")
ROUNDED = ["dtype=bfloat16", "stochastic_rounding=true"]

RECIPES: dict[str, list[str]] = {
    "full": FULL,
    "full adam8bit": [*FULL, "optimizer=adam8bit"],
    "full bfloat16": [*FULL, "dtype=bfloat16"],
    "low_rank": ["method=low_rank", "method.start=uniform", "rank=16"],
    "low_rank in_backward": ["method=low_rank", "method.start=uniform", "rank=16", *IN_BACKWARD],
    **{
        f"{support} {path}": [*SPARSE, f"support={support}", f"layer_path={path}"]
        for support in SUPPORTS
        for path in ("composed", "factored")
    },
    **{f"{support} factored": [*FACTORED, f"support={support}"] for support in ("slice", "rolled")},
    "adam8bit": [*FACTORED, "optimizer=adam8bit"],
    "accumulated": [*FACTORED, *TWO],
    "accumulated clipped": [*FACTORED, *TWO, "grad_clip=0.5", "weight_decay=0.1"],
    "clipped each": [*FACTORED, "grad_clip_per_parameter=0.1"],
    "checkpointing": [*FACTORED, "activation_checkpointing=true"],
    "checkpointing composed": [*SPARSE, "layer_path=composed", "activation_checkpointing=true"],
    "pack": [*FACTORED, "padding=pack"],
    "best_fit": [*FACTORED, "padding=best_fit"],
    "grouped heads and overrides": [
        *FACTORED,
        "model.num_key_value_heads=2",
        "rank_overrides={q_proj:4,o_proj:0}",
        "sparsity_overrides={up_proj:0.2,v_proj:0}",
    ],
    "tied": [*FACTORED, "model.tie_word_embeddings=true", "model.rope_theta=500000"],
    "z_loss": [*FACTORED, "z_loss=0.01"],
    "in_backward": [*FACTORED, *IN_BACKWARD],
    "in_backward hold": [*FACTORED, *IN_BACKWARD, *TWO, "grad_clip_per_parameter=0.1"],
    "in_backward adam8bit": [*FACTORED, *IN_BACKWARD, "optimizer=adam8bit"],
    "in_backward adam8bit hold": [*FACTORED, *IN_BACKWARD, *TWO, "optimizer=adam8bit"],
    "bfloat16": [*FACTORED, "dtype=bfloat16"],
    "bfloat16 composed": [*SPARSE, "layer_path=composed", "dtype=bfloat16"],
    "bfloat16 rounded": [*FACTORED, *ROUNDED],
    "bfloat16 adam8bit": [*FACTORED, "dtype=bfloat16", "optimizer=adam8bit"],
    "bfloat16 adam8bit rounded": [*FACTORED, *ROUNDED, "optimizer=adam8bit"],
    "bfloat16 in_backward rounded": [*FACTORED, *ROUNDED, *IN_BACKWARD],
    "bfloat16 float32 moments": [*FACTORED, "dtype=bfloat16", "moments_dtype=float32"],
    "mixed": [*FACTORED, "precision=mixed"],
    "mixed full in_backward": [*FULL, *IN_BACKWARD, "precision=mixed"],
    "bfloat16 in_backward adam8bit rounded": [*FACTORED, *ROUNDED, *IN_BACKWARD, "optimizer=adam8bit"],
}
# Every other method and optimizer: its actions and phases within the 20 updates, at a rate at which it learns.
RECIPES |= {
    "cola": ["method=cola", "rank=16"],
    "cr_net": ["method=cr_net", "rank=16", "model.num_hidden_layers=4", "activation_checkpointing=true", "lr=0.003"],
    "dlr": ["method=dlr", "rank=16"],
    "gradnorm_lorp": ["method=gradnorm_lorp", "rank=16"],
    "int8": ["method=int8", "optimizer=q_galore", "optimizer.rank=16", "optimizer.update_every=4", "lr=0.003"],
    "loro": ["method=loro", "rank=16", "method.exact_every=6", "method.restart_warmup=2"],
    "lost": ["method=lost", "rank=16", "sparsity=0.06"],
    "low_rank restarts": ["method=low_rank", "rank=16", "method.restart_every=8", "method.restart_warmup=2"],
    "maestro": ["method=maestro", "method.max_rank=32", "method.penalty=0.001", "method.shrink_every=6"],
    "pufferfish": ["method=pufferfish", "rank=16", "sparsity=0.06", "method.dense_share=0.5", "lr=0.003"],
    "relora": ["method=relora", "rank=16", "method.warm_start=0.5", "method.merge_every=4", "method.merge_warmup=2"],
    "slope": ["method=slope", "rank=16", "method.adapter_share=0.5", "lr=0.003"],
    "sparse": ["method=sparse", "method.sparsity=0.5", "lr=0.003"],
    "sst": ["method=sst", "rank=16", "method.select_every=3", "method.iterations=2", "method.restart_warmup=1"],
    "structured_ffn": ["method=structured_ffn", "method.structure=block_shuffle", "method.guided=true", "lr=0.003"],
    "switchlora": ["method=switchlora", "rank=16", "method.switch_every=8", "method.freeze=2", "method.candidates=16"],
}
RATES = {"lion": 0.003, "sgd": 1.0, "adafactor": 0.1, "polargrad": 0.03, "spectron": 0.1}
PROJECTING = ("apollo", "dct_adamw", "fira", "galore", "q_galore", "trion")  # below the rank of A and B
RECIPES |= {
    name: [*FACTORED, f"optimizer={name}", f"lr={RATES.get(name, 0.01)}"]
    + (["optimizer.rank=4"] if name in PROJECTING else [])
    for name in OPTIMIZERS.names()
    if not name.startswith("adam")
}
RECIPES["q_galore"] += ["optimizer.update_every=2", "optimizer.queue=2"]  # renewed, and doubled, within the run
# Plain torch in place of the compiled kernel: that is decided once a process.
WITHOUT_KERNEL = {f"{support} without kernel": [*FACTORED, f"support={support}"] for support in SUPPORTS}
ALL = RECIPES | WITHOUT_KERNEL


def train_without_kernel(names: list[str]) -> dict[str, dict]:
    recipes = {name: [*BASE, *WITHOUT_KERNEL[name]] for name in names}
    return train_apart(recipes, SLTRAIN_CPU_KERNEL="off") if recipes else {}


@pytest.fixture(scope="module")
def golden() -> dict:
    recorded = json.loads(FILE.read_text())
    return {**recorded, "is_here": recorded["machine"] == machine()}


def check(name: str, found: dict, golden: dict) -> None:
    is_here = golden["is_here"]
    tolerance = None if is_here else TOLERANCES["coarse" if is_coarse(ALL[name]) else "float32"]
    wrong = differences(found, golden["runs"][name], tolerance)
    where = "bit for bit, on the machine of golden.json" if is_here else f"to {tolerance:g}, on another machine"
    assert not wrong, f"{name}: {len(wrong)} numbers differ ({where}):\n" + "\n".join(wrong[:6])


def test_every_recorded_run_has_a_recipe(golden: dict) -> None:
    assert golden["runs"].keys() == ALL.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_are_the_recorded_ones(name: str, golden: dict) -> None:
    check(name, train_anew(*BASE, *RECIPES[name]), golden)


def test_numbers_without_the_kernel_are_the_recorded_ones(golden: dict) -> None:
    for name, found in train_without_kernel(list(WITHOUT_KERNEL)).items():
        check(name, found, golden)


def test_the_recorded_runs_learn(golden: dict) -> None:
    for name, numbers in golden["runs"].items():
        assert len(numbers["loss"]) == len(numbers["grad_norm"]) == 20, name
        assert numbers["loss"][0] > 4.5 and numbers["final_loss"] < 0.8 * numbers["loss"][0], name


def write(names: list[str]) -> None:
    """Record runs, all of them without `names`."""
    runs = {}
    if names:
        old = json.loads(FILE.read_text())
        assert old["machine"] == machine(), f"golden.json was recorded on another machine: {old['machine']}"
        runs = {name: numbers for name, numbers in old["runs"].items() if name in ALL}
    chosen = names or list(ALL)
    for name in chosen:
        if name in RECIPES:
            begin = time.perf_counter()
            runs[name] = train_anew(*BASE, *RECIPES[name])
            print(f"{time.perf_counter() - begin:5.2f} s  {runs[name]['final_loss']:.4f}  {name}", flush=True)
    runs |= train_without_kernel([name for name in chosen if name in WITHOUT_KERNEL])
    ordered = {name: runs[name] for name in ALL if name in runs}
    FILE.write_text(dump({"machine": machine(), "runs": ordered}, depth=4))


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit(__doc__)
    write(sys.argv[2:])
