from lit_embed.data.records import Example, Passage, content_id, merge_examples

A, B, C = Passage("a", "text a"), Passage("b", "text b"), Passage("c", "text c")


def test_examples_with_the_same_query_are_merged() -> None:
    merged = merge_examples([Example("1", "q", (A,), (B, C)), Example("2", "r", (C,)), Example("3", "q", (B, A), (C,))])
    assert merged == [Example("1", "q", (A, B), (C,)), Example("2", "r", (C,))]  # b became a positive, so no negative


def test_scores_follow_their_passages_and_go_where_one_part_has_none() -> None:
    scored = Example("1", "q", (A,), (B, C), (3.0,), (1.0, 0.5))
    assert merge_examples([scored, Example("2", "q", (B,), (), (2.0,), None)]) == [
        Example("1", "q", (A, B), (C,), (3.0, 2.0), (0.5,))
    ]
    assert merge_examples([scored, Example("2", "q", (B,))])[0].positive_scores is None


def test_content_ids_depend_on_the_text_alone() -> None:
    assert content_id("same") == content_id("same") != content_id("other")
    assert content_id("\ud800")  # a lone surrogate, which JSON can hold
