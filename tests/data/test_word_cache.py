"""Looking words up against the plain library, which sees every text as a whole."""

import gzip
import json
import random
import string
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain.data import word_cache as module
from sltrain.data.bpe import train_bpe
from sltrain.data.tokenizer import Tokenizer
from sltrain.data.word_cache import word_cache

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
NEEDS_SHARED = ("t5", "t5_own", "t5_unstripped", "t5_first", "t5_never", "gpt2", "gpt2_prefix", "gpt2_nfc")
# What may act across the end of a word: combining marks, joiners, spaces and controls of all kinds, letters that
# belong to the character after or before them, and what becomes several characters or none.
STRANGE = (
    "\r\x0b\x07\x00\x1c\x85\xa0\u2003\u2028\u3000\ufeff\u200b\u200d\xad¨´½ﬁ▁é漢カﾞ각\u0301\u0308\u0600\u0d4e\u0e33❤️🇩İßﾟ"
)
WORDS = (
    "the of it's don't 's 't U.S. e-mail 1,000 3.14 50% (1) 11 1111 naïve http://x.y/z?a=b ... -- '' !! ' \" , . ) "
    "</s> <pad> <extra_id_0> <|endoftext|> <| foo a an in ing"
).split() + [" ", "  ", "\n", "\n\n", "\n    ", "\t", "\r\n", "a" * 40, "é" * 20, "漢" * 300]
TEXTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(WORDS), st.sampled_from([" ", " ", " ", ", ", "\n", ""])).map("".join),
        st.sampled_from(WORDS),
        st.text(alphabet=STRANGE + " ab", max_size=3),
        st.text(alphabet=string.printable, max_size=4),
    ),
    max_size=25,
).map("".join)


def metaspace(scheme="always"):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}


def unigram():
    """A small tokenizer of T5's kind, with a normalizer and pieces that compete for the same characters."""
    letters = [(c, -3.0 - i / 7) for i, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789,.!'\"()")]
    longer = [("▁", -2.0), ("▁a", -2.5), ("ing", -4.0), ("an", -4.1), ("11", -4.5), ("he", -4.6), ("e.", -5.0)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, *longer], unk_id=2)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    )
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", tokenizers.AddedToken("<extra_id_0>", lstrip=True)])
    return tokenizer.to_str()


@cache
def spec_of(kind):
    """The tokenizer.json of each kind."""
    if kind == "bpe":
        return train_bpe(iter(["the words don't matter, the more the better: 1,000 or 11 e-mails (naïve)"] * 3), 330)
    if kind == "unigram":
        return unigram()
    if kind.startswith("gpt2"):
        files = [str(SHARED / "tokenizers/gpt2" / name) for name in ("vocab.json", "merges.txt")]
        tokenizer = tokenizers.ByteLevelBPETokenizer(*files, add_prefix_space=kind == "gpt2_prefix")
        special = tokenizers.AddedToken("<|endoftext|>", normalized=kind != "gpt2_nfc")
        tokenizer.add_special_tokens([special])
        spec = json.loads(tokenizer.to_str())
        return json.dumps({**spec, "normalizer": {"type": "NFC"} if kind == "gpt2_nfc" else None})
    spec = json.loads((SHARED / "tokenizers/t5-base/tokenizer.json").read_text())
    if kind == "t5_own":  # as google-t5/t5-base is
        split = [{"type": "WhitespaceSplit"}, metaspace()]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": split}
        spec["normalizer"] = spec["normalizer"]["normalizers"][0]
    elif kind == "t5_unstripped":
        del spec["normalizer"]["normalizers"][1]
    elif kind != "t5":
        spec["pre_tokenizer"] = metaspace(kind.removeprefix("t5_"))
    return json.dumps(spec)


@cache
def loaded(kind):
    """The plain library, and a tokenizer whose table fills as the tests continue; to both, control tokens written out
    in a text are control tokens."""
    raw = tokenizers.Tokenizer.from_str(spec_of(kind))
    raw.no_truncation()
    raw.no_padding()
    return raw, Tokenizer(spec_of(kind), kind, controls_as_text=False)


@cache
def reads_text(kind):
    """To these, control tokens written out are text: the library with its own switch, and two of ours, the second
    without a table."""
    raw = tokenizers.Tokenizer.from_str(spec_of(kind))
    raw.no_truncation()
    raw.no_padding()
    raw.encode_special_tokens = True
    ours, slow = Tokenizer(spec_of(kind), kind), Tokenizer(spec_of(kind), kind)
    slow._words = None
    return raw, ours, slow


def unpack(ids):
    return None if ids is None else np.frombuffer(ids, np.int32).tolist()


@pytest.mark.parametrize("kind", ["bpe", "unigram", *NEEDS_SHARED])
@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(TEXTS, max_size=4), max_len=st.sampled_from([None, 2, 5, 30]), look=st.sampled_from([10, 1 << 16])
)
def test_ids_are_those_of_the_whole_text(kind, texts, max_len, look):
    if kind in NEEDS_SHARED and not SHARED.is_dir():
        pytest.skip("no folder of shared data beside the checkout")
    raw, tokenizer = loaded(kind)
    expected = [encoding.ids for encoding in raw.encode_batch(texts, add_special_tokens=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_ENTRIES", 200)  # so that the table is emptied now and then
        patch.setattr(module, "MAX_CHARS_PER_ROUND", look)
        for found, ids in zip(tokenizer._words.ids(texts, max_len), expected, strict=True):
            if found is not None:
                found = unpack(found)
                assert found == ids if max_len is None else found == ids[: len(found)]
                assert max_len is None or len(found) >= min(max_len, len(ids))
        assert len(tokenizer._words._table) <= 200
        cut = [ids if max_len is None else ids[: max_len - 1] for ids in expected]
        whole = [[*ids, tokenizer.eos_id] if ids else [] for ids in cut]
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts, max_len)] == whole


@pytest.mark.parametrize("kind", ["bpe", "unigram", "t5", "t5_own", "gpt2", "gpt2_nfc"])
@settings(max_examples=80, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), max_len=st.sampled_from([None, 5, 30]))
def test_control_tokens_written_out_are_text(kind, texts, max_len):
    if kind in NEEDS_SHARED and not SHARED.is_dir():
        pytest.skip("no folder of shared data beside the checkout")
    raw, ours, slow = reads_text(kind)
    controls = {i for i, token in raw.get_added_tokens_decoder().items() if token.special} - {ours.unk_id}
    found = [ids.tolist() for ids in ours.encode_batch(texts, max_len)]
    assert found == [ids.tolist() for ids in slow.encode_batch(texts, max_len)]
    for text, ids in zip(texts, found, strict=True):
        assert not controls & {*ids[:-1]}
        expected = raw.encode(text, add_special_tokens=False).ids
        if not controls & {*expected}:  # the library's switch is enough for byte-level models
            assert ids[:-1] == (expected if max_len is None else expected[: max_len - 1])
        assert not kind.startswith(("bpe", "gpt2")) or not controls & {*expected}


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_ids_of_real_text_and_hardly_a_text_is_rejected(kind, shared_data):
    raw, _ = loaded(kind)
    words = word_cache(raw, json.loads(spec_of(kind)))
    files = [*sorted((shared_data / "c4-en-mini").glob("*.gz")), next((shared_data / "wiki-en").glob("*validation*"))]
    texts = [json.loads(line)["text"] for file in files for line in gzip.open(file)]
    expected = [encoding.ids for encoding in raw.encode_batch_fast(texts, add_special_tokens=False)]
    rejected = 0
    for start in range(0, len(texts), 256):
        part = slice(start, start + 256)
        for found, head, ids in zip(words.ids(texts[part]), words.ids(texts[part], 100), expected[part], strict=True):
            rejected += found is None
            assert found is None or unpack(found) == ids
            assert head is None or unpack(head)[:100] == ids[:100]
    assert len(texts) > 2800 and rejected < 0.01 * len(texts)


@pytest.mark.parametrize(
    ("text", "is_rejected"),
    [
        ("a plain text, nothing else.", False),
        ("“naïve” cafés – 漢字 and\nnew lines\tor tabs", False),
        ("an <extra_id_0> in it", True),  # swallows the spaces around it
        ("closed </s>", True),
        ("a \x07 control character becomes nothing", True),
        ("a no-break space\xa0 and a space become one", True),
        ("a return\r\nis half of a line end", True),
        (" a space first", True),
        (", a mark first", True),
    ],
)
def test_texts_that_cannot_be_looked_up_are_rejected(text, is_rejected, shared_data):
    raw, tokenizer = loaded("t5")
    [found] = tokenizer._words.ids([text])
    assert (found is None) == is_rejected
    expected = raw.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_batch([text])[0].tolist() == [*expected, 1]


def test_sentinels_are_counted_at_every_meeting(shared_data):
    tokenizer = Tokenizer(spec_of("t5"), "t5", 32000, controls_as_text=False)
    texts = ["one <extra_id_0> two <extra_id_5>", "no sentinel", "<extra_id_0>"]
    first = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == first
    assert tokenizer.sentinels_mapped == 6 and [ids.count(2) for ids in first] == [2, 0, 1]


def test_a_long_text_is_read_only_up_to_the_ids_requested():
    text = " ".join("".join(random.Random(i).choices(string.ascii_lowercase, k=6)) for i in range(20_000))
    raw, _ = loaded("bpe")
    words = word_cache(raw, json.loads(spec_of("bpe")))
    assert unpack(words.ids([text], 50)[0])[:50] == raw.encode(text, add_special_tokens=False).ids[:50]
    assert len(words._table) < 100


def test_what_hardly_recurs_is_not_kept():
    raw, _ = loaded("bpe")
    words = word_cache(raw, json.loads(spec_of("bpe")))
    words.ids(["short " + "x" * 100])
    assert sorted(words._table) == ["short"]


def test_threads_may_share_a_table():
    raw, _ = loaded("bpe")
    words = word_cache(raw, json.loads(spec_of("bpe")))
    texts = [" ".join(random.Random(i).choices(WORDS[:30], k=40)) for i in range(400)]
    expected = [raw.encode(text, add_special_tokens=False).ids for text in texts]
    wrong = []

    def work(order):
        for i in order:
            [found] = words.ids([texts[i]])
            if found is not None and unpack(found) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(range(400)[::step],)) for step in (1, -1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
