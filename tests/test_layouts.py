"""The file layouts of FineWeb-Edu and WikiText-103: reading and preparing small substitutes."""

import dataclasses

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fsdfm_jax.data import beam
from fsdfm_jax.data import corpus as corpus_lib
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib

FINEWEB = pyarrow.schema(
    [
        ("text", pyarrow.string()),
        ("id", pyarrow.string()),
        ("dump", pyarrow.string()),
        ("url", pyarrow.string()),
        ("file_path", pyarrow.string()),
        ("language", pyarrow.string()),
        ("language_score", pyarrow.float64()),
        ("token_count", pyarrow.int64()),
        ("score", pyarrow.float64()),
        ("int_score", pyarrow.int64()),
    ]
)


def _fineweb(folder, files=3, rows=50):
    folder.mkdir(parents=True)
    for number in range(files):
        records = [
            {
                "text": f"Page {number}.{row}: what is taught there.\nIt has lines.",
                "id": f"<urn:uuid:{number}-{row}>",
                "dump": "CC-MAIN-2024-10",
                "url": f"https://example.org/{number}/{row}",
                "file_path": "s3://commoncrawl/x.warc.gz",
                "language": "en",
                "language_score": 0.97,
                "token_count": 12,
                "score": 3.2,
                "int_score": 3,
            }
            for row in range(rows)
        ]
        table = pyarrow.Table.from_pylist(records, schema=FINEWEB)
        path = folder / f"{number:03}_00000.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=10)


# Two articles; a section, and lines of tables and formulas that look like titles but stand between
# other lines or without the spaces.
ARTICLES = [
    [
        " = Valkyria <unk> III = ",
        "",
        " Senjō no Valkyria 3 : <unk> Chronicles is a game . ",
        " = not a title = ",
        "",
        " = = Gameplay = = ",
        "",
        " As with previous games , x = y = z . ",
        "",
    ],
    [" = Tower Building of the Little Rock Arsenal = ", "", " It was built in 1840 . ", "", ""],
    [" = 1 = ", "", " A number . ", " = = = Deep = = = ", " More . "],
]
LINES = ["", *(line for article in ARTICLES for line in article)]
TEXTS = ["\n".join(article).rstrip("\n") for article in ARTICLES]


def _wikitext_parquet(folder, cut=10):
    """As on the Hugging Face hub: a row is a line with its end, a blank line is empty."""
    folder.mkdir()
    rows = [line + "\n" if line else "" for line in LINES]
    for number, part in enumerate((rows[:cut], rows[cut:])):
        path = folder / f"train-{number:05}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": part}), path, row_group_size=3)


def _wikitext_raw(folder):
    """As in the original archive: blank lines hold a space."""
    folder.mkdir()
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
        lines = LINES if "train" in name else [" = Held out = ", "", f" Of {name} . " * 4, ""]
        (folder / name).write_text("".join(f"{line or ' '}\n" for line in lines), "utf-8")


def _read(corpus, layout):
    return [document.text for document in corpus_lib.documents(str(corpus), "text", layout)]


def test_fineweb_is_a_document_a_row(tmp_path):
    _fineweb(tmp_path / "sample" / "10BT")
    texts = _read(tmp_path / "sample" / "10BT" / "*.parquet", "record")
    assert texts == _read(tmp_path / "**" / "*.parquet", "record")
    assert len(texts) == 150
    assert texts[50] == "Page 1.0: what is taught there.\nIt has lines."
    # Groups are runs of row groups, some across files.
    groups = corpus_lib.groups(f"{tmp_path}/**/*.parquet", "record", 3000)
    assert len(groups) > 3
    assert any(piece.start > 0 for pieces in groups for piece in pieces)
    assert any(len(pieces) > 1 for pieces in groups)
    cut = [d for pieces in groups for d in corpus_lib.read(pieces, "text", "record")]
    assert [document.text for document in cut] == texts
    assert cut[-1].name.endswith("002_00000.parquet row 49")


@pytest.mark.parametrize("cut", range(1, len(LINES)))
def test_wikitext_articles_of_parquet_files(tmp_path, cut):
    """For any split of an article between files."""
    _wikitext_parquet(tmp_path / "hub", cut)
    assert _read(tmp_path / "hub" / "train-*.parquet", "wikitext") == TEXTS


def test_wikitext_articles_of_the_original_files(tmp_path):
    _wikitext_raw(tmp_path / "raw")
    assert _read(tmp_path / "raw" / "wiki.train.tokens", "wikitext") == TEXTS
    names = [d.name for d in corpus_lib.documents(f"{tmp_path}/raw/wiki.t*", "text", "wikitext")]
    assert names[-1] == f"{tmp_path}/raw/wiki.train.tokens:16"
    # Read as records it is one document a file.
    assert len(_read(tmp_path / "raw" / "wiki.*.tokens", "record")) == 3


def test_text_before_the_first_title_is_not_lost(tmp_path):
    (tmp_path / "x.raw").write_text(" middle of something . \n \n = A = \n \n a \n")
    assert _read(tmp_path / "x.raw", "wikitext") == [" middle of something . ", " = A = \n\n a "]


def test_wikitext_is_one_group(tmp_path):
    _wikitext_parquet(tmp_path / "hub")
    (pieces,) = corpus_lib.groups(f"{tmp_path}/hub/*", "wikitext", 1)
    assert [d.text for d in corpus_lib.read(pieces, "text", "wikitext")] == TEXTS


def test_unknown_layout(tmp_path):
    with pytest.raises(ValueError, match="data.documents must be one of record, wikitext, got 'x'"):
        corpus_lib.documents("sotu", "text", "x")


# End to end: the recipes of docs/guides/your-text.md.


def _spec(root, corpus, **changes):
    tokenizer_lib.train_bpe([], 257).save(root / "tokenizer.json")
    spec = prepared_lib.DataSpec(
        corpus=str(corpus),
        text_field="text",
        tokenizer=f"{root}/tokenizer.json",
        vocab_size=0,
        block_length=8,
        holdout=0.1,
    )
    return dataclasses.replace(spec, **changes)


def _in_turn(function, items):
    for item in items:
        function(item)


def _text(data, split):
    source = data.source(split)
    return data.tokenizer.decode(np.concatenate([source[i] for i in range(len(source))]))


def test_fineweb_is_prepared(tmp_path):
    _fineweb(tmp_path / "sample" / "10BT")
    spec = _spec(tmp_path, tmp_path / "sample" / "10BT" / "*.parquet")
    data = beam.prepare(spec, tmp_path / "data", _in_turn, group_bytes=3000)
    counts = data.manifest["splits"]
    assert counts["train"]["documents"] + counts["validation"]["documents"] == 150
    assert counts["validation"]["documents"] > 0
    assert "Page 0." in _text(data, "train")


@pytest.mark.parametrize("engine", ["local", "beam"])
def test_wikitext_is_prepared_with_its_own_validation(tmp_path, engine):
    _wikitext_raw(tmp_path / "raw")
    spec = _spec(
        tmp_path,
        tmp_path / "raw" / "wiki.train.tokens",
        documents="wikitext",
        validation=f"{tmp_path}/raw/wiki.valid.tokens",
    )
    if engine == "local":
        data = prepared_lib.prepare(spec, tmp_path / "data")
    else:
        data = beam.prepare(spec, tmp_path / "data", _in_turn)
    counts = data.manifest["splits"]
    assert (counts["train"]["documents"], counts["validation"]["documents"]) == (3, 1)
    assert counts["train"]["tokens"] == sum(len(text.encode()) + 1 for text in TEXTS)
    assert set(_text(data, "validation")) <= set(" = Held out = \n\n Of wiki.valid.tokens .")
    if engine == "beam":  # in the order of the text
        stream = "".join(TEXTS)
        assert _text(data, "train") == stream[: len(_text(data, "train"))]
