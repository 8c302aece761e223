import pytest

from lit_core.errors import InputError
from lit_embed.retrieval.fusion import fuse

LEXICAL = {"q": {"a": 10.0, "b": 6.0, "c": 2.0}, "r": {"a": 3.0}}
DENSE = {"q": {"b": 0.9, "d": 0.7, "c": 0.5}, "s": {}}


def test_min_max_by_hand() -> None:
    fused = fuse([LEXICAL, DENSE], [0.2, 0.8])
    assert fused == {"q": pytest.approx({"a": 0.2, "b": 0.1 + 0.8, "c": 0.0, "d": 0.4}), "r": {"a": 0.0}, "s": {}}


def test_equal_weights_are_the_default() -> None:
    assert fuse([LEXICAL, DENSE]) == fuse([LEXICAL, DENSE], [0.5, 0.5])


def test_reciprocal_rank_and_none_by_hand() -> None:
    ranks = fuse([LEXICAL, DENSE], [1, 1], "reciprocal-rank")["q"]
    assert ranks == pytest.approx({"a": 1 / 61, "b": 1 / 62 + 1 / 61, "c": 2 / 63, "d": 1 / 62})
    assert fuse([LEXICAL, DENSE], [1, 10], "none")["q"] == pytest.approx({"a": 10, "b": 15, "c": 7, "d": 7})


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="at least one run"):
        fuse([])
    with pytest.raises(InputError, match="one weight per run"):
        fuse([LEXICAL], [0.5, 0.5])
    with pytest.raises(InputError, match="field 'normalisation'"):
        fuse([LEXICAL], normalisation="max")  # type: ignore[arg-type]
