"""Numbers reach every sink unchanged; metrics.jsonl is strict JSON and can be cut back to any step."""

import io
import json
import math
import os
import pty
import subprocess
import sys
import termios
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain.engine.metrics import (
    Event,
    JsonlSink,
    ProgressBar,
    Throughput,
    WandbSink,
    flat,
    rewrite_until,
    safe_exp,
    task_text,
    to_strict_json,
)

ROOT = Path(__file__).resolve().parents[2]


def train_event(step: int, **numbers: Any) -> Event:
    event = {"event": "train", "step": step, "tokens": 10 * step, "positions": 16 * step, "loss": 2.0}
    return {**event, "tokens_per_second": 12345.6, "peak_memory_bytes": 3 * 2**29, **numbers}


def eval_event(event: str, step: int) -> Event:
    numbers = {"loss": 1.5, "perplexity": math.exp(1.5), "perplexity_galore_protocol": 4.25, "bits_per_byte": 1.1}
    return {"event": event, "step": step, "tokens": 1, "positions": 1, **numbers, "eval_tokens": 1_000_000}


def test_safe_exp() -> None:
    assert safe_exp(2.5) == math.exp(2.5)
    assert safe_exp(1e6) == math.inf
    assert safe_exp(-1e6) == 0.0
    assert math.isnan(safe_exp(math.nan))


class Clock:
    """A clock that the test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_excludes_pauses_and_restarts_at_each_read() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    with throughput.waiting():
        clock.now += 1
    clock.now += 3
    throughput.add(300)
    with throughput.paused():
        clock.now += 50
        with throughput.waiting():
            clock.now += 7
    throughput.add(100)
    assert throughput.read() == {"tokens_per_second": 100.0, "data_wait_fraction": 0.25}
    clock.now += 2
    throughput.add(10)
    assert throughput.read() == {"tokens_per_second": 5.0, "data_wait_fraction": 0.0}
    assert throughput.read() == {"tokens_per_second": 0.0, "data_wait_fraction": 0.0}


# ---- metrics.jsonl

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_json_is_strict_and_finite_numbers_are_exact(event: dict[str, Any]) -> None:
    text = to_strict_json(event)
    assert "\n" not in text

    def nulled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: nulled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [nulled(inner) for inner in value]
        return None if isinstance(value, float) and (value != value or abs(value) == math.inf) else value

    assert json.loads(text, parse_constant=refuse) == nulled(event)


def test_jsonl_sink_appends_one_line_an_event_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for steps in ((1, 2), (3,)):
        sink = JsonlSink(path)
        for step in steps:
            sink.log(train_event(step, loss=math.nan if step == 2 else 0.1))
            assert json.loads(path.read_text().splitlines()[-1])["step"] == step
        assert not synced
        sink.log({"event": "checkpoint", "step": step, "tokens": 0, "positions": 0})
        assert synced.pop()
        sink.close()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [
        ("train", 1), ("train", 2), ("checkpoint", 2), ("train", 3), ("checkpoint", 3)
    ]  # fmt: skip
    assert [event["loss"] for event in events if event["event"] == "train"] == [0.1, None, 0.1]


lines = st.one_of(
    st.builds(
        lambda kind, step, loss: json.dumps({"event": kind, "step": step, "loss": loss}).encode(),
        st.sampled_from(["train", "eval", "checkpoint", "final", "stopped"]),
        st.integers(0, 20),
        st.floats(allow_nan=False),
    ),
    st.sampled_from(
        [b"", b"{", b"\xff\xfe", b'{"event": "train", "st', b"[1]", b"3", b'{"event": "train"}', b"\x00" * 9]
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(lines, max_size=12), st.integers(0, 20), st.booleans())
def test_rewrite_keeps_exactly_the_complete_lines_up_to_the_step(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], step: int, is_torn: bool
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    path.write_bytes(
        b"".join(line + b"\n" for line in content) + (b'{"event": "train", "step": 0, "lo' if is_torn else b"")
    )

    expected = []
    for line in content:
        if line.endswith(b"}") and b'"step"' in line:
            event = json.loads(line)
            if event["step"] <= step and event["event"] not in ("final", "stopped"):
                expected.append(line)
    dropped = rewrite_until(path, step)
    assert path.read_bytes() == b"".join(line + b"\n" for line in expected)
    assert dropped == sum(1 for line in content if line) + is_torn - len(expected)
    assert rewrite_until(path, step) == 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_rewrite_keeps_a_whole_last_line_without_newline_and_leaves_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert rewrite_until(path, 5) == 0 and not path.exists()
    path.write_text('{"event": "train", "step": 5}')
    assert rewrite_until(path, 5) == 0
    assert path.read_text() == '{"event": "train", "step": 5}\n'


def test_rewrite_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 5}\n')

    def fail(*args: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        rewrite_until(path, 1)
    assert path.read_text() == '{"event": "train", "step": 5}\n'


# ---- the bar


def test_plain_lines_now_and_then_where_there_is_no_terminal() -> None:
    clock, stream = Clock(), io.StringIO()
    bar = ProgressBar(1000, first_step=100, stream=stream, seconds_between_lines=10, clock=clock)
    for step in range(101, 1001):
        clock.now += 0.1
        bar.log(train_event(step))
        if step == 500:
            bar.log(eval_event("eval", step))
    bar.log({"event": "checkpoint", "step": 1000, "tokens": 0, "positions": 0})
    bar.log(eval_event("final", 1000))
    bar.close()
    printed = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert 10 <= sum(line.startswith("step ") for line in printed) <= 13
    assert printed[0] == (
        "step 101/1000: loss 2.000, perplexity 7.39, 12,346 tok/s, peak memory 1.61 GB, 01:29 left"
    )  # 899 steps of 0.1 s
    assert any(line.startswith("step 1000/1000: ") and line.endswith("00:00 left") for line in printed)
    assert any(line.startswith("evaluation at step 500: loss 1.5000, perplexity 4.48") for line in printed)
    assert printed[-1].startswith("final evaluation at step 1000") and printed[-1].endswith("on 1,000,000 tokens")
    assert "4.25" in printed[-1] and "1.1000 bits per byte" in printed[-1]


def test_utilisation_is_shown_where_it_is_known() -> None:
    stream = io.StringIO()
    ProgressBar(2, stream=stream).log({**train_event(1), "tflops": 123.4, "mfu": 0.4567})
    assert "12,346 tok/s, 45.7 % MFU, peak" in stream.getvalue()


def test_numbers_that_are_not_finite_do_not_stop_the_bar() -> None:
    stream = io.StringIO()
    bar = ProgressBar(2, stream=stream)
    bar.log(train_event(1, loss=math.nan))
    bar.log(train_event(2, loss=1e9))
    bar.log({**eval_event("eval", 2), "perplexity": math.inf, "bits_per_byte": math.nan})
    assert "loss nan" in stream.getvalue() and "perplexity inf" in stream.getvalue()


@pytest.mark.parametrize("columns", [100, 0])
def test_a_terminal_gets_a_bar_and_one_without_columns_lines(columns: int) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with open(theirs, "w") as terminal:
        bar = ProgressBar(10, first_step=4, stream=terminal)
        bar.log(train_event(5))
        bar.log(eval_event("eval", 5))
        bar.log(train_event(10))
        bar.close()
        shown = ""
        while "10/10" not in shown:  # a terminal hands out what it has so far
            shown += os.read(ours, 100_000).decode()
    os.close(ours)
    assert "10/10" in shown and "loss 2.000" in shown and "12,346 tok/s" in shown and "evaluation at step 5" in shown
    assert ("%|" in shown) == (columns > 0)


# ---- W&B


class FakeWandb(types.ModuleType):
    """Records what is asked of it, with the few names that the sink uses."""

    def __init__(self, mode: str, has_key: bool) -> None:
        super().__init__("wandb")
        self.Error = type("Error", (Exception,), {})
        self.Settings = dict
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.inits: list[dict[str, Any]] = []
        self.finished = False
        self._mode, self._has_key = mode, has_key

    def setup(self) -> Any:
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self._mode))

    def login(self, prompt: bool) -> bool:
        assert prompt is False and self._mode == "online"
        return self._has_key

    def init(self, **arguments: Any) -> Any:
        self.inits.append(arguments)
        log = lambda numbers, step: self.logged.append((step, numbers))  # noqa: E731
        return types.SimpleNamespace(log=log, url="https://wandb.example/run", finish=self._finish)

    def _finish(self) -> None:
        self.finished = True


def make_sink(run_dir: Path) -> WandbSink:
    return WandbSink(run_dir, project="p", entity=None, config={"rank": 8})


@pytest.mark.parametrize(
    ("mode", "has_key", "expected", "words"),
    [
        ("online", True, "online", "https://wandb.example/run"),
        ("online", False, "offline", "no API key"),
        ("offline", True, "offline", "wandb sync"),
        ("disabled", False, "disabled", None),
    ],
)
def test_wandb_mode_id_and_keys(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    has_key: bool,
    expected: str,
    words: str | None,
    lines: list[str],
) -> None:
    fake = FakeWandb(mode, has_key)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):  # the second time is a resumed run
        lines.clear()
        sink = make_sink(tmp_path)
        assert len(lines) == (words is not None) and all(words in line for line in lines if words)
        sink.log(train_event(3))
        sink.log(eval_event("eval", 3))
        sink.close()
    first, second = fake.inits
    assert first["id"] == second["id"] == (tmp_path / "wandb_id").read_text().strip() and len(first["id"]) == 8
    assert first["mode"] == expected and first["config"] == {"rank": 8} and first["dir"] == str(tmp_path)
    assert first["resume"] == ("allow" if expected == "online" else None)
    step, numbers = fake.logged[0]
    assert step == 3 and numbers["train/loss"] == 2.0 and numbers["train/tokens"] == 30
    assert not {"train/event", "train/step"} & numbers.keys()
    assert fake.logged[1][1]["eval/perplexity"] == math.exp(1.5)
    assert fake.finished


def test_wandb_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb("online", True)
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def fail(**arguments: Any) -> None:
        raise fake.Error("the server does not answer")

    fake.init = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="tracker=wandb: the server does not answer.*tracker=none"):
        make_sink(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        make_sink(tmp_path)


def test_real_wandb_records_offline_without_a_key(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    script = """
        import sys
        from pathlib import Path
        from sltrain.engine.metrics import WandbSink
        from sltrain.log import lines_on
        assert "wandb" not in sys.modules
        with lines_on("stdout"):
            sink = WandbSink(Path(sys.argv[1]), project="p", entity=None, config={"rank": 8})
        sink.log({"event": "final", "step": 3, "loss": float("nan"), "num_parameters": {"total": 5}, "measure": "x"})
        sink.close()
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "offline" in done.stdout and done.stderr == "", done
    run_id = (tmp_path / "wandb_id").read_text().strip()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))


def test_tasks_are_one_line_and_flat_keys_for_trackers() -> None:
    tasks = {"piqa": {"acc": 0.52041, "acc_stderr": 0.0117}, "wiki": {"word_perplexity": 1234567.0}}
    assert task_text(tasks) == "piqa acc 0.5204 ± 0.0117; wiki word_perplexity 1.2346e+06"
    assert task_text(tasks, most=1).endswith("; and 1 more")
    assert flat({"event": "eval", "step": 3, "loss": 2.0, "tasks": tasks}) == {
        "eval/loss": 2.0,
        "eval/tasks/piqa/acc": 0.52041,
        "eval/tasks/piqa/acc_stderr": 0.0117,
        "eval/tasks/wiki/word_perplexity": 1234567.0,
    }
