import pytest
from torch.utils.data import DataLoader

from lit_core.errors import InputError


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ({}, "no text"),
        ({"path": "a.jsonl"}, "a.jsonl: no text"),
        ({"path": "a.jsonl", "line": 3}, "a.jsonl:3: no text"),
        ({"path": "a.jsonl", "line": 3, "field": "query"}, "a.jsonl:3: field 'query': no text"),
        ({"field": "query"}, "field 'query': no text"),
    ],
)
def test_the_message_names_the_place(place: dict[str, object], text: str) -> None:
    assert str(InputError("no text", **place)) == text  # type: ignore[arg-type]


def test_the_message_is_one_line_and_a_value_error() -> None:
    error = InputError("first\nsecond")
    assert str(error) == "first second"
    assert isinstance(error, ValueError)


def _refuse(rows: list[int]) -> None:
    raise InputError(f"cannot be read, row {rows[0]}", "a.png")


def test_a_loader_worker_s_error_is_told_without_its_traceback() -> None:
    loader = DataLoader([7], collate_fn=_refuse, num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(InputError) as error:
        next(iter(loader))
    assert str(error.value) == "a.png: cannot be read, row 7"
