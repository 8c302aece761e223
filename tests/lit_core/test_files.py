from pathlib import Path

import pytest

from lit_core.errors import InputError
from lit_core.files import atomic_path, read_json, read_jsonl, write_json, write_jsonl, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "value.txt"
    write_text(target, "old")

    def fail_half_way() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_round_trips_keep_any_text(tmp_path: Path) -> None:
    value = {"text": "naïve\u2028line\n", "number": 1.5, "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    write_jsonl(tmp_path / "a.jsonl", [value, {}])
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, value), (2, {})]


def test_lines_are_counted_with_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert [number for number, _ in read_jsonl(tmp_path / "a.jsonl")] == [1, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"{", "not valid JSON"), (b"[1]", "expected a JSON object, got list"), (b"\xff", "not valid")],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"a\.jsonl:2: {message}"):
        list(read_jsonl(tmp_path / "a.jsonl"))


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json: file not found"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(InputError, match=r"gone\.jsonl: file not found"):
        list(read_jsonl(tmp_path / "gone.jsonl"))
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"half\.json: not valid JSON"):
        read_json(tmp_path / "half.json")
