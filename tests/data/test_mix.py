"""data=mix: rows drawn by weight, against a draw written out here and against each source read alone."""

import json
import random
import shutil
import string
from collections import Counter
from dataclasses import asdict
from hashlib import blake2b

import pytest
import torch
import yaml
from loopback_hub import REVISION, hub  # noqa: F401  (a fixture)

import sltrain
from sltrain.compose import TRAIN, compose_config, conf_dir, read_config, run_config
from sltrain.data.bpe import train_bpe
from sltrain.data.documents import DataError, NetworkError, is_held_out
from sltrain.data.evaluation import EvalSet
from sltrain.data.load_tokenizer import load_tokenizer
from sltrain.data.mixed_evaluation import MixedEvalSet
from sltrain.data.mixture import Mixture, Part, errors_of
from sltrain.data.order import drawn
from sltrain.data.sources.local import LocalFiles
from sltrain.data.stream import TrainStream
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks
from sltrain.engine.evaluate import evaluate

WEIGHTS = {"wiki": 5.0, "code": 3.0, "law": 2}  # sorted: code, law, wiki
SHAPE = {"seed": 1, "seq_len": 16, "padding": "pack", "global_batch_size": 8, "num_streams": 4, "shuffle_block": 7}
TINY = ["model=llama_tiny", "max_steps=1"]


def sentence(rng, length):
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 6))) for _ in range(length))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return {name: [f"{name} {i}: {sentence(rng, rng.randint(1, 30))}" for i in range(60)] for name in WEIGHTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("mix")
    for name, own in texts.items():
        write(folder / f"{name}.jsonl", own)
    (folder / "tokenizer.json").write_text(train_bpe((t for own in texts.values() for t in own), 350))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer((folder / "tokenizer.json").read_text(), "test")


def mixture(folder, weights=WEIGHTS, holdout_every=0):
    return Mixture({n: Part(LocalFiles(f"{folder}/{n}.jsonl"), w, holdout_every) for n, w in weights.items()})


def make(source, tokenizer, **changes):
    return TrainStream(source, tokenizer, **{**SHAPE, "prefetch": 2, **changes})


def take(stream, count):
    """`count` batches, after which the stream is closed."""
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def by_stream(batches, num_streams=4):
    """The rows of each logical stream, as lists of ids."""
    found = [[] for _ in range(num_streams)]
    for batch in batches:
        per_stream = len(batch.input_ids) // num_streams
        for i, row in enumerate(batch.input_ids.tolist()):
            found[i // per_stream].append(row)
    return found


def draw(weights, seed, stream, row):
    """The source of a row, by the rule in data/mixed_stream.py, written out anew."""
    number = int.from_bytes(blake2b(repr(("mix", seed, stream, row)).encode(), digest_size=8).digest(), "big")
    point = number / 2**64 * sum(weights.values())
    for name in sorted(weights):
        if point < weights[name]:
            return name
        point -= weights[name]
    raise AssertionError


@pytest.mark.parametrize("padding", ["pack", "truncate_pad", "best_fit"])
def test_rows_are_those_of_each_source_alone_in_the_order_of_the_draw(folder, tokenizer, padding):
    count = 80  # more than an epoch of every source
    mixed = by_stream(take(make(mixture(folder), tokenizer, padding=padding), count))
    alone = {
        name: by_stream(take(make(LocalFiles(f"{folder}/{name}.jsonl"), tokenizer, padding=padding), count))
        for name in WEIGHTS
    }
    for stream, rows in enumerate(mixed):
        used = Counter()
        for number, row in enumerate(rows):
            name = draw(WEIGHTS, 1, stream, number)
            assert row == alone[name][stream][used[name]]
            used[name] += 1
        assert min(used.values()) > 15


def test_shares_approach_the_weights(folder, tokenizer):
    total = sum(WEIGHTS.values())
    found = Counter(drawn(list(WEIGHTS.values()), "mix", 7, stream, row) for stream in range(8) for row in range(2500))
    for index, weight in enumerate(WEIGHTS.values()):
        share = weight / total
        assert abs(found[index] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5
    batch = take(make(mixture(folder), tokenizer, global_batch_size=32), 60)[-1]  # packed: rows are tokens
    for name, tokens in batch.source_tokens.items():
        assert tokens / (60 * 32 * 16) == pytest.approx(WEIGHTS[name] / total, abs=0.04)


def test_tokens_are_counted_by_source_without_pads(folder, tokenizer):
    batches = take(make(mixture(folder), tokenizer, padding="truncate_pad"), 12)
    so_far = 0
    for batch in batches:
        so_far += batch.num_tokens
        assert list(batch.source_tokens) == sorted(WEIGHTS) and sum(batch.source_tokens.values()) == so_far
    assert take(make(LocalFiles(f"{folder}/law.jsonl"), tokenizer), 1)[0].source_tokens == {}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_rows_do_not_depend_on_the_number_of_processes(folder, tokenizer, world_size):
    whole = take(make(mixture(folder), tokenizer), 25)
    parts = [take(make(mixture(folder), tokenizer, rank=rank, world_size=world_size), 25) for rank in range(world_size)]
    for batch, *same in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([part.input_ids for part in same]), batch.input_ids)
        assert sum((Counter(part.source_tokens) for part in same), Counter()) == Counter(batch.source_tokens)
        assert {key: state for part in same for key, state in part.state.items()} == batch.state


def run_in_legs(source_of, tokenizer, legs, **shape):
    """The rows of global batches of (number of batches, number of ranks) legs, each from the JSON state before it."""
    rows, saved = [], None
    for leg, (count, world_size) in enumerate(legs):
        states, parts = {}, []
        for rank in range(world_size):
            stream = make(source_of(leg), tokenizer, rank=rank, world_size=world_size, **shape)
            if saved is not None:
                stream.load_state_dict(json.loads(saved))
            parts.append(take(stream, count))
            states.update(stream.state_dict())
        rows += [torch.cat([part[k].input_ids for part in parts]).tolist() for k in range(count)]
        saved = json.dumps(states)
    return rows, json.loads(saved)


@pytest.mark.parametrize("padding", ["pack", "truncate_pad", "best_fit"])
def test_two_stops_give_the_rows_of_a_straight_run(folder, tokenizer, padding):
    shape = {"padding": padding, "holdout_every": 0}

    def source_of(leg):
        return mixture(folder, holdout_every=5)

    straight, _ = run_in_legs(source_of, tokenizer, [(60, 1)], **shape)
    resumed, state = run_in_legs(source_of, tokenizer, [(17, 1), (20, 2), (11, 8), (12, 4)], **shape)
    assert resumed == straight
    assert max(source["epoch"] for source in state["0"]["sources"].values()) >= 1
    assert set(state["0"]) == {"row", "sources", "tokens"} and state["0"]["row"] == 60 * 2


def test_the_order_of_names_decides_nothing(folder, tokenizer):
    turned = dict(reversed(WEIGHTS.items()))
    a, b = (take(make(mixture(folder, weights), tokenizer), 5) for weights in (WEIGHTS, turned))
    assert all(torch.equal(x.input_ids, y.input_ids) and x.state == y.state for x, y in zip(a, b, strict=True))


def test_other_weights_hold_from_the_stop_on(folder, tokenizer):
    """Rows before the stop are those of the old weights; every source goes on where it was."""
    new = {"wiki": 1.0, "code": 9.0, "law": 2.0}
    rows, _ = run_in_legs(lambda leg: mixture(folder, [WEIGHTS, new][leg]), tokenizer, [(20, 1), (20, 1)])
    alone = {n: by_stream(take(make(LocalFiles(f"{folder}/{n}.jsonl"), tokenizer), 40)) for n in WEIGHTS}
    for stream in range(4):
        used = Counter()
        for number, row in enumerate(row for batch in rows for row in batch[2 * stream : 2 * stream + 2]):
            name = draw(WEIGHTS if number < 40 else new, 1, stream, number)
            assert row == alone[name][stream][used[name]]
            used[name] += 1
    state = take(make(mixture(folder), tokenizer), 1)[0].state
    stream = make(mixture(folder, new), tokenizer)
    stream.load_state_dict(state)
    assert (stream.old_weights, stream.weights) == (WEIGHTS, new)
    assert take(stream, 1)[0].state["identity"]["weights"] == new
    stream = make(mixture(folder), tokenizer)
    stream.load_state_dict(state)
    assert stream.old_weights is None


def test_other_sources_are_refused_by_name(folder, tokenizer, tmp_path, texts):
    state = take(make(mixture(folder), tokenizer), 1)[0].state
    write(tmp_path / "wiki.jsonl", texts["wiki"][:-1])
    parts = mixture(folder).parts
    moved = Mixture({**parts, "wiki": Part(LocalFiles(f"{tmp_path}/wiki.jsonl"), 5.0, 0)})
    for other, words in [
        (moved, "the corpus of data.mix.wiki has changed"),
        (Mixture({n: part for n, part in parts.items() if n != "law"}), "the sources of data.mix has changed|law"),
        (mixture(folder, holdout_every=5), "held-out part .* has changed"),
        (parts["wiki"].source, "the corpus .* has changed"),
    ]:
        with pytest.raises(ValueError, match=words):
            make(other, tokenizer).load_state_dict(state)


def test_each_source_holds_out_its_own_documents(folder, tokenizer, texts):
    parts = {n: Part(LocalFiles(f"{folder}/{n}.jsonl"), 1.0, 4 if n == "wiki" else 0) for n in ("wiki", "law")}
    batches = take(make(Mixture(parts), tokenizer, padding="truncate_pad", seq_len=256), 40)
    ends = {tokenizer.pad_id, tokenizer.eos_id}
    found = {
        tokenizer.decode([i for i in row if i not in ends]) for batch in batches for row in batch.input_ids.tolist()
    }
    assert found == {t for t in texts["wiki"] if not is_held_out(t, 4)} | set(texts["law"])


def test_a_new_epoch_of_a_source_is_announced_by_its_name(folder, tokenizer, lines):
    batches = take(make(mixture(folder), tokenizer), 140)
    highest = {
        name: max(batches[-1].state[str(s)]["sources"][name]["epoch"] for s in range(4)) for name in sorted(WEIGHTS)
    }
    assert min(highest.values()) >= 1
    for name, epochs in highest.items():
        said = [line for line in lines if f"of {name} begins" in line]
        assert [int(line.split()[1]) for line in said][:epochs] == list(range(2, epochs + 2))


# ---- evaluation


def eval_set(source, tokenizer, eval_tokens, **changes):
    def new_set(part, tokens, holdout_every):
        shape = {"seq_len": 16, "padding": "pack", "batch_size": 3, **changes}
        return EvalSet(part, tokenizer, eval_tokens=tokens, holdout_every=holdout_every, **shape)

    if isinstance(source, Mixture):
        return MixedEvalSet(source, eval_tokens, new_set)
    return new_set(source, eval_tokens, 0)


class CostsItsIds(torch.nn.Module):
    """A model whose token losses are the token ids."""

    def forward(self, input_ids, labels, rows):
        targets = labels[:, 1:]
        return targets[targets != -100].double().sum()


def test_every_source_is_evaluated_on_its_share(folder, tokenizer):
    ranks = Ranks(0, 1, torch.device("cpu"))
    rows = eval_set(mixture(folder), tokenizer, 1000)
    numbers = evaluate(CostsItsIds(), rows, ranks, sources=rows.sources)
    expected, total = {}, 0.0
    for name, weight in WEIGHTS.items():
        alone = evaluate(
            CostsItsIds(), eval_set(LocalFiles(f"{folder}/{name}.jsonl"), tokenizer, round(100 * weight)), ranks
        )
        expected[name] = alone["loss"], alone["eval_tokens"]
        assert alone["eval_tokens"] == pytest.approx(100 * weight, abs=15)
        total += alone["loss"] * alone["eval_tokens"]
    assert {n: (numbers[f"loss/{n}"], numbers[f"eval_tokens/{n}"]) for n in WEIGHTS} == expected
    assert numbers["eval_tokens"] == rows.num_targets == sum(tokens for _, tokens in expected.values())
    assert numbers["loss"] == pytest.approx(total / numbers["eval_tokens"], rel=1e-12)
    assert not rows.exhausted and len(rows) == len(list(rows))


def test_evaluations_may_have_weights_of_their_own(folder):
    mix = f"a:{{path:{folder}/wiki.jsonl,weight:9,eval_weight:1}},b:{{path:{folder}/law.jsonl,weight:3}}"
    data = composed(f"{{{mix}}}").data
    assert data.open_training().weights() == {"a": 9, "b": 3}
    assert data.open_validation().weights() == {"a": 1, "b": 3}


def test_two_ranks_have_the_evaluation_of_one(folder, tokenizer):
    whole = eval_set(mixture(folder), tokenizer, 900)
    halves = [eval_set(mixture(folder), tokenizer, 900, rank=rank, world_size=2) for rank in range(2)]
    assert [half.num_targets for half in halves] == [whole.num_targets] * 2

    def rows_of(sets):
        return Counter((b.source, tuple(row)) for rows in sets for b in rows for row in b.input_ids.tolist())

    assert rows_of(halves) == rows_of([whole])


def test_a_source_with_less_text_than_its_share_is_named(folder, tokenizer, tmp_path, texts):
    write(tmp_path / "few.jsonl", texts["law"][:3])
    parts = {"few": Part(LocalFiles(f"{tmp_path}/few.jsonl"), 1.0, 0), "wiki": mixture(folder).parts["wiki"]}
    rows = eval_set(Mixture(parts), tokenizer, 900)
    assert rows.exhausted and rows.short_sources == ("few",)
    parts["few"] = Part(parts["few"].source, 1.0, 10**6)
    with pytest.raises(DataError, match=r"data\.mix\.few: no held-out validation documents"):
        eval_set(Mixture(parts), tokenizer, 900).read()


# ---- tokenizer


def test_a_tokenizer_is_trained_on_the_sources_in_their_proportions(folder, tmp_path, texts, monkeypatch):
    monkeypatch.setattr("sltrain.data.bpe.SAMPLE_CHARS", 8000)

    def load(weights):
        return load_tokenizer("bpe:300", source=mixture(folder, weights), cache_dir=tmp_path)

    def beginning(name, missing):
        for text in texts[name]:
            yield text[:missing]
            missing -= len(text)
            if missing <= 0:
                return

    chars = {"code": 2400, "law": 1600, "wiki": 4000}
    sample = [text for name in chars for text in beginning(name, chars[name])]
    assert load(WEIGHTS).json == train_bpe(iter(sample), 300) == load(dict(reversed(WEIGHTS.items()))).json
    assert len(list(tmp_path.iterdir())) == 1  # the second was in the cache
    assert load({**WEIGHTS, "wiki": 0.01}).json != load(WEIGHTS).json


# ---- configuration


def composed(mix, *more):
    return compose_config([*TINY, f"data.mix={mix}", *more], TRAIN)


def test_the_kind_of_a_source_follows_from_its_keys(tmp_path):
    config = composed("{a:{path:/x/*.gz,weight:2},b:{repo:o/r,split:dev,weight:1},c:{source:c4,weight:.5}}")
    kinds = {name: entry.source.name for name, entry in config.data.entries.items()}
    assert kinds == {"a": "local", "b": "hf", "c": "c4"} and config.data.name == "mix"
    assert [config.data.entries[n].weight for n in "abc"] == [2, 1, 0.5]
    assert config.data.entries["b"].source.split == "dev"
    assert config.data.entries["c"].source.num_train_shards == 1024  # the defaults of conf/data/c4.yaml
    assert (
        composed("{a:{path:/x,weight:1},b:{source:stdlib,weight:1}}", "on_bad_data=stop")
        .data.entries["a"]
        .source.on_bad_data
        == "stop"
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    again = read_config(tmp_path / "config.yaml")
    assert again == config and again.data.entries == config.data.entries


def test_an_experiment_may_hold_a_mixture(tmp_path, monkeypatch):
    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "conf" / "experiment" / "mixed.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /model: llama_tiny\n  - override /data: mix\n"
        "max_steps: 3\n"
        "data:\n  mix:\n    wiki: {path: /text/*.gz, weight: 0.7}\n    code: {source: stdlib, weight: 0.3}\n"
    )
    for module in ("schema", "typed"):
        monkeypatch.setattr(f"sltrain.compose.{module}.conf_dir", lambda: tmp_path / "conf")
    config = compose_config(["experiment=mixed", "data.mix.code.weight=0.6"], TRAIN)
    assert {n: (e.source.name, e.weight) for n, e in config.data.entries.items()} == {
        "wiki": ("local", 0.7),
        "code": ("stdlib", 0.6),
    }


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ("{}", "data.mix is empty; a mixture needs two sources"),
        ("{a:{path:/x,weight:1}}", "data.mix has a only; a mixture needs two sources"),
        ("{a:{path:/x,weight:0},OK}", "data.mix.a.weight=0: must be a number above 0"),
        ("{a:{path:/x,weight:-0.5},OK}", "data.mix.a.weight=-0.5: must be a number above 0"),
        ("{a:{path:/x,weight:much},OK}", "data.mix.a.weight=much: must be a number above 0"),
        ("{a:{path:/x,weight:nan},OK}", "data.mix.a.weight=nan: must be a number above 0"),
        ("{a:{path:/x},OK}", "data.mix.a has no weight"),
        ("{a:{path:/x,weight:1,eval_weight:0},OK}", "data.mix.a.eval_weight=0: must be a number above 0"),
        ("{a:{path:/x,weight:1,colour:2},OK}", "data.mix.a.colour: source=local has no such key; an entry has"),
        ("{a:{path:/x,weight:1,holdout_every:2},OK}", "data.mix.a.holdout_every: .* set data.holdout_every"),
        ("{a:{weight:1},OK}", r"data.mix.a names no text: it needs path=GLOB"),
        ("{a:{path:null,weight:1},OK}", "data.mix.a: data=local needs path=GLOB"),
        ("{a:{path:3,weight:1},OK}", "data.mix.a.path=3: must be a glob"),
        ("{a:{source:mix,weight:1},OK}", "data.mix.a: a mixture cannot be part of another"),
        ("{a:{mix:{},weight:1},OK}", "data.mix.a: a mixture cannot be part of another"),
        ("{a:{source:wikis,weight:1},OK}", "data.mix.a.source=wikis: choose one of c4, hf, local"),
        ("{a-b:{path:/x,weight:1},OK}", "data.mix: 'a-b' cannot name a source"),
        ("{a:1,OK}", "data.mix.a=1: must be a mapping"),
        ("3", "data.mix=3: "),
        ("{a:{path:/x,weight:1,text_key:[1]},OK}", "data.mix.a: text_key: Cannot convert"),
        ("{a:{path:/x,weight:1,on_bad_data:no},OK}", "data.mix.a.on_bad_data=no: choose one of skip, stop"),
        ("{a:{path:/x,weight:1,validation_path:3},OK}", "data.mix.a.validation_path=3: must be a glob"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_before_text_is_read(mix, words):
    with pytest.raises(ValueError, match=f"^{words}") as caught:
        composed(mix.replace("OK", "b:{path:/y,weight:1}"))
    assert len(str(caught.value).splitlines()) == 1


def test_what_belongs_to_one_corpus_is_refused():
    good = "{a:{path:/x,weight:1},b:{path:/y,weight:1}}"
    for more, words in [
        ("validation_path=/v", r"data\.mix\.wiki\.validation_path=GLOB"),
        ("path=/x", "data=mix does not read it"),
        ("data=stdlib", "data=stdlib has no such option; it belongs to data=mix"),
    ]:
        with pytest.raises(ValueError, match=words):
            composed(good, more)
    with pytest.raises(sltrain.Error, match="tokenize each source by itself"):
        sltrain.tokenize("/nowhere", data={"mix": {n: {"path": "/x", "weight": 1} for n in "ab"}})


def test_a_source_that_prepares_shards_is_told_which(folder, tokenizer):
    """As data=c4, which downloads a shard ahead."""
    parts = mixture(folder).parts
    asked = Counter()
    parts["law"].source.expect = lambda shard: asked.update([shard])
    take(make(Mixture(parts), tokenizer), 3)
    assert asked[0] >= 4  # once by each logical stream


def test_errors_name_the_entry_and_keep_their_kind():
    for kind in (DataError, NetworkError, ValueError):
        with (
            pytest.raises(kind, match=r"^data\.mix\.a: /data/data\.text_key is gone; set data\.mix\.a\.text_key$"),
            errors_of("a"),
        ):
            raise kind("/data/data.text_key is gone; set data.text_key")


def test_a_run_keeps_the_commit_of_each_repository(hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    hub.files["some/thing", "train.jsonl"] = b'{"text": "x"}\n'
    config = composed("{a:{repo:some/thing,weight:1},b:{path:/y,weight:1}}")
    assert config.data.settled().settled_entries == {"a": {"commit": REVISION}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    hub.revision = "f" * 40
    again = run_config([f"run_dir={tmp_path}"]).data
    assert again.settled().entries["a"].source.commit == REVISION
    other = run_config([f"init_from={tmp_path}", "data.mix.a.repo=some/other"]).data
    assert other.entries["a"].source.commit is None and other.settled_entries is None
