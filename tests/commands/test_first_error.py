"""A mistake costs the seconds until torch is there, and no more."""

import subprocess
import sys

import pytest

from sltrain.commands.train import is_plain, read_flags

SLOW = "sympy transformers datasets bitsandbytes pyarrow pandas matplotlib wandb lm_eval torch._dynamo torch._inductor"
MISTAKES = {
    "without torch": (["max_steps=-1"], f"torch {SLOW}"),
    "in the model": (["rank=1000"], SLOW),  # its shape is built on the meta device
    "in the text": (["data=local", "path=/nowhere/*.gz"], SLOW),
}
CODE = """
import sys
from sltrain.commands.train import run_command
code = run_command(sys.argv[2:])
loaded = set(sys.argv[1].split()) & set(sys.modules)
sys.exit(f"loaded: {loaded}" if loaded else int(code))
"""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_without_slow_libraries(name: str) -> None:
    typed, unwanted = MISTAKES[name]
    process = [sys.executable, "-c", CODE, unwanted, "model=llama_tiny", *typed]
    done = subprocess.run(process, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        (["model=llama_tiny", "rank=8"], True),
        (["-m", "model=llama_tiny", "rank=8,16"], False),
        (["model=llama_tiny", "--cfg", "job"], False),
        (["model=llama_tiny", "hydra.verbose=true"], False),
        (["model=llama_tiny", "hydra/launcher=slurm"], False),
    ],
)
def test_only_what_is_hydras_goes_through_its_program(typed: list[str], plain: bool) -> None:
    assert is_plain(read_flags(typed)[0]) is plain
