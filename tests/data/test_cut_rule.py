"""Which tokenizers' texts may be cut, and where."""

import json

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from sltrain.data.bpe import train_bpe
from sltrain.data.cut_rule import cut_rule, words_are_independent
from sltrain.data.pieces import CUT, CUT_AT_END, KEEP

BYTE_LEVEL = json.loads(train_bpe(iter(["some words, and some more words"]), 300))


def unigram(pieces=("a", "b", ",", "."), pre_tokenizer=None, normalizer=None):
    """The tokenizer.json of a small unigram model; by default it splits at any white space."""
    vocabulary = [("<unk>", 0.0), ("▁", -2.0), *((piece, -3.0) for piece in pieces)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=0))
    any_space = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.pre_tokenizer = pre_tokenizer or any_space
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return json.loads(tokenizer.to_str())


def rule_of(spec):
    return cut_rule(tokenizers.Tokenizer.from_str(json.dumps(spec)), spec)


def added(content, **properties):
    plain = {"id": 500, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{**plain, "content": content, **properties}]


def test_byte_level_is_cut_between_classes_but_not_after_an_apostrophe():
    rule = rule_of(BYTE_LEVEL)
    for pair in [b"a ", b"\xa9 ", b". ", b"a\n", b"a.", b"a1", b"1a", b"(a", b"a'", b"1,"]:
        assert rule.table[*pair] == CUT, pair
    for pair in [b"ab", b"12", b"()", b"'s", b"'1", b"  ", b" a", b"\na", b"a\r", b"\x07a", b"a\xc3", b"\xa9a"]:
        assert rule.table[*pair] == KEEP, pair
    assert (rule.space, rule.marks, rule.begins_as_elsewhere) == (" \n\t", {}, True)


def test_byte_level_with_a_prefix_space_or_a_normalizer_is_cut_at_white_space_only():
    with_prefix = {**BYTE_LEVEL, "pre_tokenizer": {**BYTE_LEVEL["pre_tokenizer"], "add_prefix_space": True}}
    plain_tokens = [{**token, "normalized": False} for token in BYTE_LEVEL["added_tokens"]]
    with_normalizer = {**BYTE_LEVEL, "normalizer": {"type": "NFC"}, "added_tokens": plain_tokens}
    for spec, begins_as_elsewhere in [(with_prefix, False), (with_normalizer, True)]:
        rule = rule_of(spec)
        assert rule.table[*b"a "] == CUT and rule.table[*b"a."] == KEEP
        assert rule.begins_as_elsewhere == begins_as_elsewhere


def test_a_mark_is_cut_off_unless_the_vocabulary_joins_it_with_the_letter():
    rule = rule_of(unigram(pieces=("a", "b", ",", ".", "ab,", "a.b", "!!")))
    assert rule.marks == {",": 4, ".": 5}  # "!" is no token
    assert rule.table[*b"a,"] == CUT_AT_END and rule.table[*b"b."] == CUT_AT_END
    for pair in [b"b,", b"1,", b",,", b"\xa9,", b"a!", b", "[:1] + b"a"]:
        assert rule.table[*pair] == KEEP, pair


def test_the_characters_of_added_tokens_are_kept_together():
    spec = {**BYTE_LEVEL, "added_tokens": added("<|end1|>")}
    rule = rule_of(spec)
    assert all(rule.table[*pair] == KEEP for pair in [b"|e", b"d1", b"1|"]) and rule.table[*b"2|"] == CUT
    assert "," not in rule_of({**unigram(), "added_tokens": added("[,]")}).marks


def test_metaspace_is_cut_only_where_normalization_leaves_a_space():
    rule = rule_of(unigram(pre_tokenizer=pre_tokenizers.Metaspace()))
    assert rule.space == " " and rule.marks == {}
    to_space = normalizers.Sequence([normalizers.Replace(tokenizers.Regex(" {2,}"), "▁")])
    assert rule_of(unigram(pre_tokenizer=pre_tokenizers.Metaspace(), normalizer=to_space)).space == " "
    assert rule_of(unigram()).space == " \n\t"


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "x"}},  # joins the words
        {"added_tokens": added("a b")},
    ],
)
def test_words_that_depend_on_each_other_are_recognised(change):
    assert words_are_independent(unigram())
    spec = {**unigram(), **change}
    assert not words_are_independent(spec) and rule_of(spec) is None


def test_a_cut_rule_requires_more_than_independent_words():
    spec = unigram()
    for change in [
        {"added_tokens": added("a\nb")},
        {"added_tokens": added("ab", normalized=True), "normalizer": {"type": "NFC"}},
    ]:
        assert words_are_independent({**spec, **change}) and rule_of({**spec, **change}) is None
    dropout = {**BYTE_LEVEL, "model": {**BYTE_LEVEL["model"], "dropout": 0.1}}
    assert words_are_independent(dropout) and rule_of(dropout) is None
