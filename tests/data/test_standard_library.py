"""The standard library as a corpus."""

import pytest

from sltrain.data.documents import DataError
from sltrain.data.sources.stdlib import StandardLibrary


def test_the_library_of_this_python_is_a_corpus_of_real_size():
    source = StandardLibrary()
    texts = [d.text for shard in range(source.num_shards) for d in source.documents(shard)]
    assert 5e6 < sum(map(len, texts)) < 5e7
    assert source.num_shards == 16
    assert max(map(len, texts)) < 20_000
    assert any("def json" in text or "import json" in text for text in texts)
    assert not any("from test import support" in text and "unittest.main()" in text for text in texts[:500])
    assert StandardLibrary().fingerprint() == source.fingerprint()


def test_files_are_cut_at_line_ends_and_packages_and_tests_skipped(tmp_path):
    body = "".join(f"x{i} = {i}\n" for i in range(3000))
    (tmp_path / "mod.py").write_text(body)
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# \xe9\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe broken")
    for folder in ["test", "site-packages", "pkg/tests", "__pycache__"]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "no.py").write_text("skipped")
    source = StandardLibrary(tmp_path)
    shards = [[d.text for d in source.documents(shard)] for shard in range(source.num_shards)]
    assert shards[0] == ["# -*- coding: latin-1 -*-\n# é\n"]
    assert "".join(shards[1]) == body and len(shards[1]) > 5
    assert all(text.endswith("\n") and len(text) <= 4096 for text in shards[1])
    part = [(d.index, d.text) for d in source.documents(1, start=3, wanted=lambda index: index % 2 == 0)]
    assert part == [(i, t) for i, t in enumerate(shards[1]) if i >= 3 and i % 2 == 0]
    before = source.fingerprint()
    (tmp_path / "mod.py").write_text(body.replace("x1 ", "y1 "))  # same size
    assert StandardLibrary(tmp_path).fingerprint() != before


def test_a_python_without_sources_says_so(tmp_path):
    with pytest.raises(DataError, match="data=local"):
        StandardLibrary(tmp_path)
