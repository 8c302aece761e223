import json
from pathlib import Path

import pytest
from PIL import Image

from lit_core.errors import InputError
from lit_embed.data.image_rows import ImageFolder, Row, read_rows
from lit_embed.items import ImageFile, Item

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from datasets and what it imports


def row(tmp_path: Path, **values: object) -> Row:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return Row(values, Path("rows.jsonl"), 7, ImageFolder(tmp_path))


def test_items_of_rows(tmp_path: Path) -> None:
    image = ImageFile(tmp_path / "a.png")
    assert row(tmp_path, t=" what? \n", i="a.png").item("t", "i") == Item("what?", image)
    assert row(tmp_path, t="see <|image_1|> here", i="a.png").item("t", "i").parts() == ("see ", " here")
    assert row(tmp_path, t=None, i="a.png").item("t", "i") == Item("", image)
    assert row(tmp_path, t="words", i=None).item("t", "i") == row(tmp_path, t="words", i="").item("t", "i")
    assert row(tmp_path, t="words", i="").item("t", "i") == Item("words")
    absolute = row(tmp_path, t="", i=str(tmp_path / "a.png")).item("t", "i")
    assert absolute == Item("", image)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"t": "x"}, "rows.jsonl:7: field 'i': the field is missing; the row has: t"),
        ({"i": ""}, "rows.jsonl:7: field 't': the field is missing"),
        ({"t": 3, "i": ""}, "rows.jsonl:7: field 't': must be a string, got int"),
        ({"t": "x", "i": ["a.png"]}, "rows.jsonl:7: field 'i': must be a string, got list"),
        ({"t": "x", "i": "b.png"}, "rows.jsonl:7: field 'i': no such image: "),
        ({"t": "<|image_1|> x", "i": ""}, "rows.jsonl:7: field 't': has <|image_1|> in its text, but no image"),
        ({"t": "<|image_1|> <|image_1|>", "i": "a.png"}, "rows.jsonl:7: field 't': has <|image_1|> 2 times"),
        ({"t": " ", "i": ""}, "rows.jsonl:7: field 't': has neither a text nor an image"),
    ],
)
def test_mistakes_name_file_line_and_field(tmp_path: Path, values: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as error:
        row(tmp_path, **values).item("t", "i")
    assert str(error.value).startswith(words)


def test_images_are_looked_for_once(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    assert folder.find("a.png") is None
    (tmp_path / "a.png").touch()
    assert folder.find("a.png") is None
    (tmp_path / "b.png").touch()
    assert folder.find("b.png") is folder.find("b.png") is not None


ROWS = [{"a": "1", "b": ["z"]}, {"a": "2", "b": ["x", "y"]}]


def test_the_same_rows_from_every_type_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    images = ImageFolder(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "rows.parquet"))
    for name, lines in (("rows.jsonl", [1, 2]), ("rows.json", [2, 8]), ("rows.parquet", [1, 2])):
        found = list(read_rows(tmp_path / name, images))
        assert [row.values for row in found] == ROWS
        assert [row.line for row in found] == lines
        assert {row.path for row in found} == {tmp_path / name}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", ":1: expected a JSON list"),
        ("[{}\n{}]", ":2: not valid JSON (expected a comma"),
        ('[\n{"a": 1},\n{"a" 1}]', ":3: not valid JSON"),
        ("[{},\n\n\n 3]", ":4: expected a JSON object, got int"),
        ("[{}, ", ":1: not valid JSON"),
        ("[{}", ":1: not valid JSON (expected a comma"),
        ("", ":1: expected a JSON list"),
    ],
)
def test_broken_json_lists(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError) as error:
        list(read_rows(tmp_path / "rows.json", ImageFolder(tmp_path)))
    assert str(error.value).startswith(f"{tmp_path / 'rows.json'}{words}")


def test_json_lists_against_the_json_module(tmp_path: Path) -> None:
    text = ' \n[ {"a": "[{,"}\n,{"b": {"c": [1, 2]}},\n\n{"d": "\\n"} \n ] \n'
    (tmp_path / "rows.json").write_text(text)
    found = list(read_rows(tmp_path / "rows.json", ImageFolder(tmp_path)))
    assert [row.values for row in found] == json.loads(text)
    assert [row.line for row in found] == [2, 3, 5]
    (tmp_path / "rows.json").write_text("[]")
    assert not list(read_rows(tmp_path / "rows.json", ImageFolder(tmp_path)))


def test_files_that_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").touch()
    (tmp_path / "latin.json").write_bytes(b"[\xe9]")
    for name, words in (("rows.txt", "rows are read from"), ("no.jsonl", "file not found"), ("latin.json", "UTF-8")):
        with pytest.raises(InputError, match=words):
            list(read_rows(tmp_path / name, ImageFolder(tmp_path)))
