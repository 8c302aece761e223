import json
from pathlib import Path
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_rl.data.preference_rows import parse_preference, read_preferences, split_position

HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: help\n\nAssistant: Of course.",
    "rejected": "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: help\n\nAssistant: Of no use.",
}
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no")))


def parse(**row: Any) -> Any:
    return parse_preference(row, "id", "file", 1)


def test_dialogues_of_hh() -> None:
    pair = parse(**HH)
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == (HH["chosen"], HH["rejected"], 0.0)
    assert pair["opening"] == "Human: hi"  # later turns of a conversation share it


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi ", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi ", "chosen": "hi yes", "rejected": "hi no"},
        {"chosen": "hi yes", "rejected": "hi no"},
    ],
)
def test_texts_with_and_without_a_prompt(row: dict[str, str]) -> None:
    pair = parse(**row)
    assert (pair["chosen"], pair["rejected"], pair["opening"]) == ("hi yes", "hi no", "hi")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_messages_with_and_without_a_prompt(row: dict[str, Any]) -> None:
    pair = parse(**row, margin=2)
    assert pair["chosen"] == [USER, GOOD]
    assert pair["rejected"] == [USER, BAD]
    assert (pair["opening"], pair["margin"]) == ("hi", 2.0)


def test_texts_that_share_nothing_and_pairs_without_a_difference() -> None:
    assert parse(chosen="yes", rejected="no")["opening"] == "yes"
    assert parse(chosen="same", rejected="same") is None
    assert parse(prompt=[USER], chosen=[GOOD], rejected=[GOOD]) is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "a b"}, "field 'rejected': the field is missing; the row has: chosen"),
        ({"chosen": "a b", "rejected": " "}, "field 'rejected': is empty"),
        ({"chosen": 3, "rejected": "a"}, "field 'chosen': must be a text or a list of messages, got int"),
        ({"chosen": [], "rejected": "a"}, "field 'chosen': needs at least one message"),
        ({"chosen": [GOOD], "rejected": "a"}, "field 'rejected': must be a text where"),
        ({"chosen": [{"role": "user"}], "rejected": [BAD]}, r"field 'chosen\[0\]': a message has the fields"),
        ({"chosen": [{"role": "user", "content": ""}], "rejected": [BAD]}, r"field 'chosen\[0\].content': is empty"),
        ({"chosen": [{"role": 1, "content": "a"}], "rejected": [BAD]}, r"field 'chosen\[0\].role': must be a text"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "field 'prompt': must be a text where"),
        ({"chosen": "a", "rejected": "b", "margin": "2"}, "field 'margin': must be a number, got '2'"),
        ({"chosen": "a", "rejected": "b", "margin": float("nan")}, "field 'margin': must be a number, got nan"),
        ({"chosen": "a\ud800", "rejected": "b"}, "field 'chosen': holds half of a surrogate pair"),
    ],
)
def test_broken_rows_are_told_in_one_line(row: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=rf"^file:1: {words}") as error:
        parse(**row)
    assert "\n" not in str(error.value)


def test_files_and_folders(tmp_path: Path) -> None:
    same = {"chosen": "a", "rejected": "a"}
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "b.jsonl").write_text(json.dumps(HH) + "\n\n" + json.dumps(same))
    (tmp_path / "a.jsonl").write_text(json.dumps(HH))
    (tmp_path / "notes.txt").write_text("not read")
    found = read_preferences(tmp_path)
    assert [pair and pair["id"] for pair in found] == ["a:1", "part/b:1", None]
    assert [pair and pair["id"] for pair in read_preferences(tmp_path / "part" / "b.jsonl")] == ["b:1", None]
    (tmp_path / "a.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": ')
    with pytest.raises(InputError, match=r"a\.jsonl:2: not valid JSON"):
        read_preferences(tmp_path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"packed: this folder has no \.jsonl file; unpack its \.jsonl\.gz files"):
        read_preferences(tmp_path / "packed")
    with pytest.raises(InputError, match="file not found"):
        read_preferences(tmp_path / "none.jsonl")


def test_split_positions_are_spread_evenly_and_never_change() -> None:
    assert split_position("Human: hi", 0) == pytest.approx(0x59A09F843B164855 / 2**64)  # by b2sum
    places = [split_position(str(number), 0) for number in range(4000)]
    assert sum(place < 0.25 for place in places) == pytest.approx(1000, abs=100)
    assert sum(abs(a - split_position(str(n), 1)) < 1e-9 for n, a in enumerate(places)) == 0
