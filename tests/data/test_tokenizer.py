"""Tokenizer rules against the plain `tokenizers` library."""

import json
import os
import random
import string
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain.data import tokenizer as module
from sltrain.data.bpe import train_bpe
from sltrain.data.documents import DataError, is_held_out
from sltrain.data.load_tokenizer import load_tokenizer
from sltrain.data.sources.local import LocalFiles
from sltrain.data.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
T5 = SHARED / "tokenizers/t5-base/tokenizer.json"
needs_t5 = pytest.mark.skipif(not T5.exists(), reason="shared data absent")


def words(seed, count=400):
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(string.ascii_lowercase[:8], k=rng.randint(1, 7))) for _ in range(count))


BPE = train_bpe((words(seed) for seed in range(20)), 400)


def unigram(num_sentinels=3, with_unk=True, post_process=True):
    """A small tokenizer of T5's kind: Metaspace, unigram, sentinels as the last ids, </s> added by the file."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>" if with_unk else "<strange>", 0.0), ("▁", -2.0)]
    pieces += [(c, -3.0) for c in string.ascii_lowercase] + [("▁a", -2.5), ("ab", -2.5)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    sentinels = [f"<extra_id_{i}>" for i in range(num_sentinels)]
    tokenizer.add_special_tokens(["<pad>", "</s>", *(["<unk>"] if with_unk else []), *sentinels])
    if post_process:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return tokenizer


def encode(tokenizer, texts, max_len=None):
    """Ids as lists."""
    return [ids.tolist() for ids in tokenizer.encode_batch(texts, max_len)]


@pytest.mark.parametrize("post_process", [True, False])
def test_every_document_ends_with_eos_exactly_once(post_process):
    text = unigram(post_process=post_process).to_str()
    tokenizer = Tokenizer(text, "test")
    plain = unigram(post_process=False)
    texts = ["abba", "", "a b c", "   ", "z"]
    expected = [plain.encode(t).ids for t in texts]
    assert encode(tokenizer, texts) == [[*ids, 1] if ids else [] for ids in expected]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.json == text


def test_a_leading_bos_is_kept():
    raw = unigram()
    raw.add_special_tokens(["<s>"])
    bos = raw.token_to_id("<s>")
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = Tokenizer(raw.to_str(), "test")
    assert encode(tokenizer, ["a b"]) == [[*raw.encode("a b").ids, 1]]
    assert encode(tokenizer, ["a b c d e"], max_len=4) == [[*raw.encode("a b c d e").ids[:3], 1]]
    assert encode(tokenizer, [""]) == [[]]


def test_truncation_and_padding_switched_on_in_the_file_do_not_matter():
    raw = unigram()
    raw.enable_truncation(3)
    raw.enable_padding(length=20)
    text = raw.to_str()
    tokenizer = Tokenizer(text, "test")
    assert encode(tokenizer, ["a b c d e f"]) == encode(Tokenizer(unigram().to_str(), "test"), ["a b c d e f"])
    assert tokenizer.json == text and json.loads(tokenizer.json)["truncation"] is not None


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("ab cde \n\t\u00a0é漢!?'s 12"), max_size=300),
    max_len=st.integers(2, 30),
    kind=st.sampled_from(["bpe", "unigram"]),
)
def test_truncation_is_that_of_the_library_however_the_text_was_cut(text, max_len, kind):
    """The text is cut before it is tokenized; the ids must be those of the whole text."""
    spec = BPE if kind == "bpe" else unigram().to_str()
    raw = tokenizers.Tokenizer.from_str(spec)
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    empty = not raw.encode(text, add_special_tokens=False).ids
    raw.enable_truncation(max_len)
    tokenizer = Tokenizer(spec, "test")
    assert tokenizer._can_cut
    tokenizer._words = None  # as for texts that cannot be looked up
    for chars_per_token in (1, 2, module.CHARS_PER_TOKEN):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CHARS_PER_TOKEN", chars_per_token)
            assert encode(tokenizer, [text, "a", text], max_len)[2] == ([] if empty else raw.encode(text).ids)


def test_unknown_tokenizers_are_never_cut():
    raw = unigram()
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    assert not Tokenizer(raw.to_str(), "test")._can_cut
    raw = unigram()
    raw.normalizer = tokenizers.normalizers.Replace("a b", "c")
    assert not Tokenizer(raw.to_str(), "test")._can_cut
    raw = unigram()
    raw.add_tokens(["a b"])
    assert not Tokenizer(raw.to_str(), "test")._can_cut


@needs_t5
def test_cutting_is_exact_on_real_text():
    tokenizer = load_tokenizer(str(T5), 32000)
    assert tokenizer._can_cut
    files = LocalFiles([f"{SHARED}/c4-en-mini/c4-train*", f"{SHARED}/english-novels/*validation*"])
    texts = [d.text for shard in range(files.num_shards) for d in files.documents(shard)][:700]
    raw = tokenizers.Tokenizer.from_file(str(T5))
    raw.enable_truncation(128)
    expected = [e.ids for e in raw.encode_batch_fast(texts)]
    assert encode(tokenizer, texts, max_len=128) == expected
    tokenizer._words = None
    assert encode(tokenizer, texts, max_len=128) == expected
    assert sum(len(text) > 128 * module.CHARS_PER_TOKEN for text in texts) > 300


def test_sentinels_become_unk_are_counted_and_named_once(lines):
    size = unigram(num_sentinels=0).get_vocab_size()
    tokenizer = Tokenizer(unigram().to_str(), "test", size, controls_as_text=False)
    assert tokenizer.vocab_size == size
    texts = ["a<extra_id_0>b<extra_id_2>", "ab", "<extra_id_1>"]
    for ids, plain in zip(encode(tokenizer, texts), unigram().encode_batch(texts), strict=True):
        assert ids == [i if i < size else 2 for i in plain.ids]
    assert tokenizer.sentinels_mapped == 3
    assert len(lines) == 1 and "<extra_id_0>" in lines[0]
    ids, sizes = tokenizer.encode_with_bytes(["<extra_id_1>"])[0]
    assert ids == [2, 1] and sizes == [12, 0]


def test_a_tokenizer_with_more_ordinary_pieces_than_the_model_is_refused():
    size = unigram(num_sentinels=0).get_vocab_size()
    with pytest.raises(ValueError, match=f"model.vocab_size={size}"):
        Tokenizer(unigram().to_str(), "test", size - 1)
    raw = unigram()
    raw.add_tokens(["ordinary"])  # not special: text gives it
    with pytest.raises(ValueError, match=f"model.vocab_size={size + 4}"):
        Tokenizer(raw.to_str(), "test", size)
    assert Tokenizer(unigram().to_str(), "test").vocab_size == size + 3
    assert Tokenizer(unigram().to_str(), "test", size + 100).vocab_size == size + 100


def test_special_tokens_are_found_by_name_or_missed_in_words():
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    tokenizer = Tokenizer(raw.to_str(), "test")
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 1, None)
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="no end-of-text token"):
        Tokenizer(raw.to_str(), "test")
    raw = unigram(with_unk=False)
    with pytest.raises(ValueError, match="no <unk>"):
        Tokenizer(raw.to_str(), "test", unigram(num_sentinels=0).get_vocab_size())


@pytest.mark.parametrize("spec", [BPE, unigram().to_str()])
def test_a_control_token_written_out_is_text_counted_and_reported_once(spec, lines):
    raw, tokenizer = tokenizers.Tokenizer.from_str(spec), Tokenizer(spec, "test")
    texts = ["a </s> b", "a<pad>b </s>", "plain"]
    ids = encode(tokenizer, texts)
    assert all({0, 1}.isdisjoint(row[:-1]) for row in ids) and ids[2] == [*encode(Tokenizer(spec, "x"), ["plain"])[0]]
    assert (
        tokenizer.controls_written == 3 and len(lines) == 1 and "</s> written out: it is read as plain text" in lines[0]
    )
    before = Tokenizer(spec, "test", controls_as_text=False)
    assert encode(before, texts)[0] == [*raw.encode(texts[0], add_special_tokens=False).ids, 1] != ids[0]
    assert before.fingerprint() != tokenizer.fingerprint()


def test_the_token_that_ends_documents_is_named_beside_the_file_or_by_the_user(tmp_path):
    raw = unigram()
    raw.add_special_tokens(["<end>", "<fill>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(str(tmp_path))
    settings = {"eos_token": {"content": "<end>"}, "pad_token": "<fill>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    named = load_tokenizer(str(tmp_path))
    assert (named.eos_id, named.pad_id) == (raw.token_to_id("<end>"), raw.token_to_id("<fill>"))
    assert encode(named, ["a"])[0][-1] == named.eos_id and named.fingerprint() != plain.fingerprint()
    assert load_tokenizer(str(tmp_path), eos="<fill>").eos_id == raw.token_to_id("<fill>")
    again = load_tokenizer(str(tmp_path), begun_with=named.settings())
    assert again.fingerprint() == named.fingerprint()
    assert load_tokenizer(str(tmp_path), begun_with={}).eos_id == plain.eos_id  # a run of an earlier version
    with pytest.raises(ValueError, match="tokenizer_eos=<nothing>: .* no such token"):
        load_tokenizer(str(tmp_path), eos="<nothing>")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read.*restore it"):
        load_tokenizer(str(tmp_path))


def no_unknown():
    """A tokenizer that raises on what it does not know."""
    raw = tokenizers.Tokenizer(tokenizers.models.Unigram([("</s>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.0)]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    return raw


def test_a_tokenizer_that_cannot_encode_a_character_is_refused_at_the_start(tmp_path):
    raw = no_unknown()
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"cannot encode .* \(U\+FFFD\).*bpe:8192"):
        load_tokenizer(str(tmp_path))
    for letter in "ab":
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({letter: 0, "</s>": 1}, unk_token="<unk>"))
        words.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"cannot encode .* \(U\+"):
            load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("max_len", [None, 4])
def test_a_text_that_cannot_be_encoded_is_bad_data(max_len, lines):
    tokenizer = Tokenizer(no_unknown().to_str(), "test")
    texts = ["a b", "a é b", "b"]
    for _ in range(3):
        assert encode(tokenizer, texts, max_len) == [
            [1, 2, 1, 3, 0][:3] + [0] if max_len else [1, 2, 1, 3, 0],
            [],
            [1, 3, 0],
        ]
    assert [ids for ids, _ in tokenizer.encode_with_bytes(texts)] == encode(tokenizer, texts)
    assert len(lines) == 3 and "'a é b'" in lines[0] and "no further warnings" in lines[2]
    with pytest.raises(DataError, match="cannot encode the text that begins with 'a é b'"):
        Tokenizer(no_unknown().to_str(), "test", on_bad_data="stop").encode_batch(texts, max_len)


def test_other_formats_say_how_to_convert_them(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    for spec in (f"{tmp_path}/tokenizer.model", str(tmp_path)):
        with pytest.raises(
            ValueError, match=r"tokenizer\.model is not a tokenizer\.json; convert it .*save_pretrained"
        ):
            load_tokenizer(spec)
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + BPE.encode())  # as some editors save it
    assert load_tokenizer(str(tmp_path)).json == BPE


@needs_t5
def test_t5_has_32000_ids_and_a_hundred_sentinels():
    tokenizer = load_tokenizer(str(T5.parent), 32000)
    assert encode(tokenizer, ["Hello world"]) == [[8774, 296, 1]]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.vocab_size) == (0, 1, 2, 32000)
    assert load_tokenizer(str(T5)).vocab_size == 32100
    with pytest.raises(ValueError, match="model.vocab_size=32000"):
        load_tokenizer(str(T5), 31999)
    assert tokenizer.json == T5.read_text()


@pytest.mark.parametrize("spec", [BPE, unigram().to_str()])
@pytest.mark.parametrize("max_len", [None, 20])
def test_bytes_of_ids_add_up_to_the_text_they_stand_for(spec, max_len):
    tokenizer = Tokenizer(spec, "test")
    texts = ["plain ascii words", "  lead", "é漢字 mixed “quotes” \u00a0 x", words(3, 40), "x" * 100, ""]
    raw = tokenizers.Tokenizer.from_str(spec)
    for text, (ids, sizes) in zip(texts, tokenizer.encode_with_bytes(texts, max_len), strict=True):
        assert ids == encode(tokenizer, [text], max_len)[0]
        assert len(ids) == len(sizes)
        offsets = raw.encode(text, add_special_tokens=False).offsets[: max(len(ids) - 1, 0)]
        assert sum(sizes) == len(text[: max((end for _, end in offsets), default=0)].encode())
        assert not sizes or sizes[-1] == 0
        if max_len is None:
            assert sum(sizes) == len(text.encode())


def corpus(tmp_path, num_files=3, num_documents=60):
    for shard in range(num_files):
        lines = [json.dumps({"text": words(1000 * shard + i, 80)}) for i in range(num_documents)]
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(lines))
    return LocalFiles(f"{tmp_path}/*.jsonl")


def test_bpe_is_trained_once_on_training_documents_and_cached(tmp_path, lines):
    source, cache = corpus(tmp_path), tmp_path / "cache"
    read = []

    class Watched:
        name, num_shards, check, fingerprint = source.name, source.num_shards, source.check, source.fingerprint

        def documents(self, shard):
            read.append(shard)
            return source.documents(shard)

    first = load_tokenizer("bpe:300", None, Watched(), cache, holdout_every=3)
    again = load_tokenizer("bpe:300", None, Watched(), cache, holdout_every=3)
    assert first.json == again.json and first.vocab_size == 300
    assert read == [0, 1, 2] and len(lines) == 1
    kept = [d.text for shard in range(3) for d in source.documents(shard) if not is_held_out(d.text, 3)]
    assert first.json == train_bpe(iter(kept), 300)
    assert load_tokenizer("bpe:300", None, source, cache).json != first.json  # another corpus
    assert load_tokenizer("bpe:280", None, source, cache).vocab_size == 280
    assert sorted(p.suffix for p in cache.iterdir()) == [".json"] * 3
    text = "Any text at all: é 漢字 \x00 \n"
    ids = encode(first, [text])[0]
    assert tokenizers.Tokenizer.from_str(first.json).decode(ids) == text
    assert (first.pad_id, first.eos_id, first.unk_id) == (0, 1, 2) and ids[-1] == 1


def test_bpe_on_a_tiny_corpus_has_fewer_pieces_and_says_so(tmp_path, lines):
    (tmp_path / "a.txt").write_text("a small small small corpus")
    tokenizer = load_tokenizer("bpe:5000", None, LocalFiles(f"{tmp_path}/a.txt"), tmp_path / "c")
    assert 259 < tokenizer.vocab_size < 400
    assert any(f"has {tokenizer.vocab_size}" in line for line in lines)


@pytest.mark.parametrize("spec", ["bpe:x", "bpe:", "bpe:258", "bpe:-1"])
def test_a_wrong_bpe_size_is_refused(tmp_path, spec):
    with pytest.raises(ValueError, match="from 259"):
        load_tokenizer(spec, None, corpus(tmp_path, 1, 1), tmp_path)


def test_missing_and_invalid_files_are_refused_in_one_line(tmp_path):
    for spec in ["./nothing.json", f"{tmp_path}/nothing", str(tmp_path), "~/nowhere/tokenizer.json"]:
        with pytest.raises(ValueError, match="cannot be read") as caught:
            load_tokenizer(spec)
        assert "\n" not in str(caught.value)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a valid tokenizer\.json"):
        load_tokenizer(f"{tmp_path}/a.json")
    (tmp_path / "b.json").write_bytes(os.urandom(50) + b"\xff")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        load_tokenizer(f"{tmp_path}/b.json")


def with_bos(**kind):
    """The small tokenizer with a <s> that its post-processor puts first."""
    raw = unigram(**kind)
    raw.add_special_tokens(["<s>"])
    bos = raw.token_to_id("<s>")
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return raw, bos


BYTES = tokenizers.Tokenizer.from_str(BPE)
BYTE_LEVEL = Tokenizer(BPE, "test")


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab cde \n\t\u00a0é漢🙂!?'s 12"), min_size=1, max_size=60))
def test_a_prompt_is_a_document_without_its_end(text):
    assert BYTE_LEVEL.encode_prompt(text) == BYTES.encode(text, add_special_tokens=False).ids
    assert BYTE_LEVEL.encode_prompt(text) == encode(BYTE_LEVEL, [text])[0][:-1]
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode_prompt(text)) == text


def test_a_prompt_of_other_tokenizers():
    tokenizer = Tokenizer(unigram().to_str(), "test")
    assert tokenizer.encode_prompt("a b") == unigram(post_process=False).encode("a b").ids  # no </s>
    raw, bos = with_bos()
    assert Tokenizer(raw.to_str(), "test").encode_prompt("a b") == raw.encode("a b").ids
    assert raw.encode("a b").ids[0] == bos
    for empty in (tokenizer, BYTE_LEVEL, Tokenizer(raw.to_str(), "test")):
        with pytest.raises(ValueError, match="prompt holds no text"):
            empty.encode_prompt("")
    small = Tokenizer(unigram(num_sentinels=3).to_str(), "test", vocab_size=32, controls_as_text=False)
    assert 2 in small.encode_prompt("a <extra_id_0> b") and max(small.encode_prompt("a <extra_id_0> b")) < 32


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40))
def test_a_text_comes_in_pieces_that_never_change(ids):
    """Random ids: most make no whole characters. What came is a beginning of the text, and the rest is short."""
    text_of, told = BYTE_LEVEL.text_stream(), ""
    for i, token in enumerate(ids):
        told += text_of(token)
        whole = BYTES.decode(ids[: i + 1], skip_special_tokens=True)
        assert whole.startswith(told)
    assert BYTE_LEVEL.decode(ids) == BYTES.decode(ids, skip_special_tokens=True)
    rest = BYTE_LEVEL.decode(ids)[len(told) :]
    assert set(rest) <= {"\ufffd"}


def metaspace():
    """The small tokenizer as T5's file is: its pieces become text with spaces again."""
    raw = unigram()
    raw.decoder = tokenizers.decoders.Metaspace()
    return raw


@pytest.mark.parametrize("text", ["héllo 漢字 🙂🙂 end", "a</s>b c d", "  two  spaces "])
def test_a_character_comes_whole(text):
    ids = BYTE_LEVEL.encode_prompt(text)
    text_of = BYTE_LEVEL.text_stream()
    pieces = [text_of(token) for token in ids]
    assert "".join(pieces) == BYTE_LEVEL.decode(ids) == text
    assert sum(piece != "" for piece in pieces) > 3 and "\ufffd" not in "".join(pieces)


def test_each_stream_has_its_own_memory():
    one, two = BYTE_LEVEL.text_stream(), BYTE_LEVEL.text_stream()
    first, *others = BYTE_LEVEL.encode_prompt("漢")
    assert one(first) == "" and two(BYTE_LEVEL.encode_prompt("a")[0]) == "a"
    assert "".join(one(token) for token in others) == "漢"


def test_special_tokens_are_not_text():
    tokenizer = Tokenizer(metaspace().to_str(), "test")
    ids = tokenizer.encode_prompt("ab a b")
    assert tokenizer.decode([0, *ids, 1, 0]) == tokenizer.decode(ids) == "ab a b"
    text_of = tokenizer.text_stream()
    assert "".join(text_of(token) for token in [0, *ids, 1]) == "ab a b"


def test_special_ids_by_hugging_faces_names():
    plain = Tokenizer(unigram().to_str(), "test")
    assert plain.special_ids() == {"eos_token": 1, "pad_token": 0, "unk_token": 2}
    assert plain.special_tokens() == {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    raw, bos = with_bos()
    assert Tokenizer(raw.to_str(), "test").special_ids()["bos_token"] == bos
    assert Tokenizer(raw.to_str(), "test").special_tokens()["bos_token"] == "<s>"
    few = tokenizers.ByteLevelBPETokenizer()
    few.train_from_iterator([words(1)], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    ids = Tokenizer(few.to_str(), "test").special_ids()
    assert ids == {"eos_token": 0, "pad_token": 0}  # as training pads


@needs_t5
def test_t5s_text_comes_back_in_pieces():
    tokenizer, raw = Tokenizer(T5.read_text(), "t5", 32000), tokenizers.Tokenizer.from_file(str(T5))
    text = "The history of Rome, good or bad, began 2,700 years ago."
    ids = tokenizer.encode_prompt(text)
    assert ids == raw.encode(text, add_special_tokens=False).ids and ids[-1] != 1
    text_of = tokenizer.text_stream()
    assert "".join(text_of(token) for token in ids) == raw.decode(ids) == text
