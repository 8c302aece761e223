import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from lit_core.datasets import load_rows
from lit_core.errors import InputError
from lit_embed.data.huggingface import StreamLoader, load_examples, row_parser

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from datasets and what it imports


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two shards of 20 rows with columns of another name; the last query of the first shard comes again."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(2):
        rows = [{"ask": f"query {shard}-{i}", "answer": f"text {shard}-{i}"} for i in range(20)]
        rows[0]["ask"] = "query 0-19" if shard else rows[0]["ask"]
        (data / f"train-{shard}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(data)


COLUMNS = {"query": "ask", "positive": "answer"}


def stream(folder: str, **options: Any) -> StreamLoader:
    rows, parse = load_rows(folder, streaming=True), row_parser(folder, COLUMNS)
    options = {"batch_size": 4, "steps_per_epoch": 3, "window": 16, "seed": 1, **options}
    return StreamLoader(rows, parse, lambda items: [(i["query"], i["passages"][0], i["seed"]) for i in items],
                        name="set", **options)  # fmt: skip


def test_a_folder_is_read_and_merged(folder: str) -> None:
    examples = load_examples(folder, columns=COLUMNS)
    assert len(examples) == 39
    assert [p.text for p in examples[19].positives] == ["text 0-19", "text 1-0"]
    assert len(load_examples(folder, columns=COLUMNS, limit=5)) == 5


def test_a_parquet_file_is_read(folder: str, tmp_path: Path) -> None:
    load_rows(folder).to_parquet(tmp_path / "pairs.parquet")
    assert load_examples(str(tmp_path / "pairs.parquet"), columns=COLUMNS) == load_examples(folder, columns=COLUMNS)


def test_dataset_mistakes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no column 'question'; the dataset has: ask, answer"):
        load_examples(folder, columns={"query": "question"})
    with pytest.raises(InputError, match="no positive"):
        load_examples(folder)
    with pytest.raises(InputError, match="no Hugging Face dataset could be loaded") as error:
        load_rows("nobody/no-such-dataset")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="split nowhere"):
        load_rows(folder, split="nowhere")


def test_a_stream_gives_distinct_queries_and_goes_round(folder: str) -> None:
    loader = stream(folder, steps_per_epoch=9)
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == 9  # windows of 16, 16 and 8 rows: 4 + 3 (two rows merged) + 2 batches
    assert all(len({query for query, _, _ in batch}) == 4 for batch in first)
    assert len({query for batch in first for query, _, _ in batch}) == 36
    assert first != second  # a new pass has a new order


def test_a_stream_does_not_depend_on_the_number_of_devices(folder: str) -> None:
    ranks = [list(stream(folder, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == list(stream(folder))


@pytest.mark.parametrize("taken", [1, 4, 6, 9, 11])
def test_a_stream_goes_on_where_it_was(folder: str, taken: int) -> None:
    whole = [batch for _ in range(5) for batch in stream(folder, steps_per_epoch=15)]
    loader = stream(folder, steps_per_epoch=15)
    assert list(islice(loader, taken)) == whole[:taken]
    state = json.loads(json.dumps(loader.state_dict()))  # plain data: checkpoints load with weights_only
    resumed = stream(folder, steps_per_epoch=15)
    resumed.load_state_dict(state)
    assert list(resumed)[: 15 - taken] == whole[taken:15]


def test_stream_mistakes(folder: str) -> None:
    with pytest.raises(InputError, match="too few different queries for one batch of 50"):
        next(iter(stream(folder, batch_size=50, window=60)))
    with pytest.raises(InputError, match="window that holds a batch"):
        stream(folder, batch_size=50)
    with pytest.raises(InputError, match="has no negatives but 1 are asked for"):
        next(iter(stream(folder, negatives=1)))
