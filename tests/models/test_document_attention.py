"""attention=document against each document alone: the same logits, losses and gradients."""

import json
import random

import pytest
import torch
from resuming import resumes_bit_for_bit
from torch import nn

import sltrain
from sltrain.config import ModelConfig
from sltrain.data.bpe import train_bpe
from sltrain.data.evaluation import EvalSet
from sltrain.data.logical_stream import Row
from sltrain.data.rows import rows_to_tensors
from sltrain.data.sources.local import LocalFiles
from sltrain.data.stream import TrainStream
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks
from sltrain.engine.evaluate import evaluate
from sltrain.engine.micro_batch import make_micro_batch
from sltrain.models.llama import LlamaForCausalLM

CPU = torch.device("cpu")
T = 24


def small_model(dtype=torch.float64, checkpointing=False, kv_heads=None) -> LlamaForCausalLM:
    config = ModelConfig("test", 32, 48, 2, 4, num_key_value_heads=kv_heads, vocab_size=350)
    model = LlamaForCausalLM(config, checkpointing).to(dtype)
    model.init_weights(0)
    with torch.no_grad():  # larger than a start, so that attention is far from uniform
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """A row of several documents, some of one token; one of a single document; one that is padded."""
    ids = torch.randint(3, 350, (3, T), generator=torch.Generator().manual_seed(0)).to(torch.int32).numpy()
    return [Row(ids[0], [5, 6, 15, 23]), Row(ids[1]), Row(ids[2][:17], [4])]


def documents(rows: list[Row]) -> list[torch.Tensor]:
    """The ids of each document of each row, alone."""
    cuts = [(row.ids, [0, *row.starts, len(row.ids)]) for row in rows]
    return [torch.tensor(ids[a:b], dtype=torch.long)[None] for ids, c in cuts for a, b in zip(c, c[1:], strict=False)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_logits_loss_and_gradients_are_those_of_each_document_alone(rows, kv_heads, checkpointing):
    model, alone = small_model(kv_heads=kv_heads, checkpointing=checkpointing), small_model(kv_heads=kv_heads)
    batch = rows_to_tensors(rows, T, 0, per_document=True)
    assert batch.positions is not None
    logits = model(batch.input_ids, positions=batch.positions)
    found = torch.cat([logits[i, : len(row.ids)] for i, row in enumerate(rows)])
    expected = torch.cat([alone(ids)[0] for ids in documents(rows)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (model(batch.input_ids) - logits).abs().max() > 0.01  # attention=full sees more

    loss = model(*make_micro_batch(batch.input_ids, batch.labels, CPU, batch.positions))
    losses = [
        nn.functional.cross_entropy(alone(ids)[0, :-1], ids[0, 1:], reduction="sum")
        for ids in documents(rows)
        if ids.shape[1] > 1
    ]
    torch.testing.assert_close(loss, sum(losses), check_dtype=False)
    assert batch.num_targets == sum(ids.shape[1] - 1 for ids in documents(rows))
    loss.backward(), sum(losses).backward()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_bfloat16_logits_are_close(rows):
    model = small_model(torch.bfloat16)
    batch = rows_to_tensors(rows, T, 0, per_document=True)
    logits = model(batch.input_ids, positions=batch.positions)[0]
    expected = torch.cat([model(ids)[0] for ids in documents(rows[:1])])
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefgh", k=rng.randint(1, 40))) for _ in range(120)]
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return LocalFiles(str(path)), Tokenizer(train_bpe(iter(texts), 300), "test")


def test_the_stream_says_where_documents_begin(text):
    """By </s>, with which every document ends."""
    source, tokenizer = text
    stream = TrainStream(
        source, tokenizer, seed=0, seq_len=T, padding="pack", global_batch_size=4, num_streams=2, per_document=True
    )
    for _ in range(30):
        batch = next(stream)
        tensors = (batch.input_ids, batch.labels, batch.positions)
        for ids, labels, positions in zip(*(tensor.tolist() for tensor in tensors), strict=True):
            place = 0
            for t in range(T):
                place = 0 if t == 0 or ids[t - 1] == tokenizer.eos_id else place + 1
                assert positions[t] == place
                assert labels[t] == (-100 if t and place == 0 else ids[t])
        assert batch.num_targets == int((batch.labels[:, 1:] != -100).sum())
        assert batch.num_tokens == 4 * T
    stream.close()


def test_evaluation_is_that_of_the_pieces_of_documents_alone(text):
    source, tokenizer = text
    keys = {"seq_len": T, "padding": "pack", "eval_tokens": 700, "batch_size": 3}
    eval_set = EvalSet(source, tokenizer, per_document=True, **keys)
    model = small_model()
    numbers = evaluate(model, eval_set, Ranks(0, 1, CPU))
    pieces = []
    for ids in (row for batch in EvalSet(source, tokenizer, **keys) for row in batch.input_ids.tolist()):
        ends = [t + 1 for t, i in enumerate(ids) if i == tokenizer.eos_id]
        cuts = [0, *ends, *([T] if ends[-1:] != [T] else [])]
        pieces += [torch.tensor([ids[a:b]]) for a, b in zip(cuts, cuts[1:], strict=False)]
    total = count = num_bytes = 0
    for piece in pieces:
        if count >= 700:
            break
        labels = piece.clone()
        total += model(piece, labels).item()
        count += piece.shape[1] - 1
        num_bytes += len(tokenizer.decode(piece[0, 1:].tolist()).encode())
    assert abs(numbers["eval_tokens"] - 700) < T and abs(numbers["loss"] - total / count) < 0.05
    assert eval_set.num_targets == numbers["eval_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["pack", "best_fit"])
def test_a_run_resumes_bit_for_bit_and_is_evaluated_as_it_was(padding, tiny, sltrain_train, tmp_path):
    """Stopped after updates 2 and 5; sltrain.evaluate, and that of an export, see the same rows as the run."""
    run = tmp_path / "straight"
    resumes_bit_for_bit([*tiny, f"padding={padding}", "attention=document"], sltrain_train, tmp_path, at=(2, 5))
    loss = sltrain.Run(run).final["loss"]
    assert sltrain.evaluate(run)["loss"] == pytest.approx(loss, rel=1e-12)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(40)))
    of_run = sltrain.evaluate(run, str(text))
    of_export = sltrain.evaluate(sltrain.export(run, tmp_path / "export"), str(text), batch_size=4)
    assert of_run["eval_tokens"] == of_export["eval_tokens"]
    assert of_run["loss"] == pytest.approx(of_export["loss"], rel=1e-5)
    code, _, err = sltrain_train(*tiny, "attention=document")
    assert code == 2 and err.startswith("error: attention=document is for padding=pack or best_fit")
