from pathlib import Path

import pytest

from lit_core.errors import InputError
from lit_embed.data.records import Example, Passage
from lit_embed.data.sources import BeirSource, RowSource, WorldSource, kind_of
from lit_embed.data.world import WorldConfig

DATA = Path(__file__).parents[4] / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "med").is_dir(), reason="needs the real collections in ../shared/data")


@real
def test_cranfield_trains_on_judgements_and_titles_and_keeps_its_splits() -> None:
    source = BeirSource(str(DATA / "cranfield"))
    qrels, titles = source.train_sets()
    assert (qrels.name, titles.name) == ("cranfield/qrels", "cranfield/title")
    assert len(titles.examples) > 1300
    assert source.note() is None
    asked = [set(source.collection(stage).queries) for stage in ("validate", "test")]
    assert not asked[0] & asked[1]
    assert not {example.query_id for example in qrels.examples} & (asked[0] | asked[1])


@real
@pytest.mark.parametrize(("name", "kind"), [("med", "sentence"), ("cisi", "title")])
def test_without_a_dev_split_pairs_are_held_out_and_the_test_split_is_not_touched(name: str, kind: str) -> None:
    source = BeirSource(str(DATA / name))
    (train,) = source.train_sets()
    assert train.name == f"{name}/{kind}"
    validation = source.collection("validate")
    assert f"validation uses {len(validation.queries)} of" in str(source.note())
    total = len(train.examples) + len(validation.queries)
    assert len(validation.queries) == min(200, total // 10)
    assert not set(validation.queries.values()) & {example.query for example in train.examples}
    assert not set(validation.queries.values()) & set(source.collection("test").queries.values())
    assert len(validation.corpus) == len(source.collection("test").corpus)
    for query_id, relevant in validation.qrels.items():  # the passage does not begin with what asks for it
        assert all(not validation.corpus[d].startswith(validation.queries[query_id]) for d in relevant)


@real
def test_asking_for_what_a_folder_lacks() -> None:
    with pytest.raises(InputError, match="no judgements for split 'train'; this folder has: test"):
        BeirSource(str(DATA / "med"), pairs="qrels").train_sets()
    with pytest.raises(InputError, match="no training pairs of kind 'title'"):
        BeirSource(str(DATA / "med"), pairs="title").train_sets()
    with pytest.raises(InputError, match="no judgements for split 'valid'"):
        BeirSource(str(DATA / "med"), val_split="valid").collection("validate")
    asked = BeirSource(str(DATA / "med"), val_split="test")
    assert asked.collection("validate") == asked.collection("test")


def test_judged_queries_are_held_out_where_they_are_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text("\n".join(f'{{"_id": "d{i}", "text": "text {i}"}}' for i in range(20)))
    (tmp_path / "queries.jsonl").write_text("\n".join(f'{{"_id": "q{i}", "text": "query {i}"}}' for i in range(20)))
    rows = "".join(f"q{i}\td{i}\t2\n" for i in range(20))
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    source = BeirSource(str(tmp_path))
    (train,), validation = source.train_sets(), source.collection("validate")
    assert (len(train.examples), len(validation.queries)) == (18, 2)
    assert {example.query_id for example in train.examples} | set(validation.queries) == {f"q{i}" for i in range(20)}
    assert all(list(validation.qrels[q]) == [f"d{q[1:]}"] for q in validation.queries)


def test_the_world_is_split_by_name() -> None:
    source = WorldSource(WorldConfig(documents=150, train_questions=60, dev_questions=10, test_questions=10, texts=10))
    (train,) = source.train_sets()
    assert len(source.collection("validate").queries) == 10
    assert not set(source.collection("test").queries.values()) & {example.query for example in train.examples}
    with pytest.raises(InputError, match="no split 'valid', only train, dev, test"):
        WorldSource(source.config, val_split="valid").collection("validate")


def test_rows_are_held_out_with_their_passages() -> None:
    examples = [
        Example(f"q{i}", f"query {i}", (Passage(f"p{i}", f"positive {i}"),), (Passage(f"n{i}", f"negative {i}"),))
        for i in range(100)
    ]
    source = RowSource("rows", lambda: examples)
    (train,) = source.train_sets()
    validation, test = source.collection("validate"), source.collection("test")
    assert (len(train.examples), len(validation.queries), len(test.queries)) == (90, 5, 5)
    parts = [{e.query_id for e in train.examples}, set(validation.queries), set(test.queries)]
    assert len(set.union(*parts)) == 100
    assert len(validation.corpus) == 200  # its own passages and all others, which are fewer than the sample
    assert all(validation.corpus[f"n{query_id[1:]}"] for query_id in validation.queries)
    with pytest.raises(InputError, match="too few"):
        RowSource("rows", lambda: examples[:2]).train_sets()


def test_kinds_of_paths(tmp_path: Path) -> None:
    (tmp_path / "beir").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "train.parquet").touch()
    (tmp_path / "a.jsonl").touch()
    assert kind_of("world") == "world"
    assert kind_of(str(tmp_path / "beir")) == "beir"  # empty: the reader tells what is missing
    assert kind_of(str(tmp_path / "hf")) == "huggingface"
    assert kind_of(str(tmp_path / "a.jsonl")) == "jsonl"
    assert kind_of("sentence-transformers/natural-questions") == "huggingface"
    for path in ("../nowhere", "/nowhere", "nowhere.jsonl", "a/b/c"):
        with pytest.raises(InputError, match="no such file or folder"):
            kind_of(path)
