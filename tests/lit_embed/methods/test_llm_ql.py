from pathlib import Path
from typing import Any

import pytest
import torch

from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_core.tokens import Tokens
from lit_embed.methods.llm_ql import LLMQL
from lit_embed.modules.batches import LikelihoodCollator, PairCollator
from lit_embed.modules.encoder import build_encoder
from lit_embed.modules.tokenization import EncoderConfig

ENCODER = EncoderConfig(query_prompt="search: ", passage_prompt="read: ", suffix=" so:", passage_length=20)
QUERIES = {"q1": "the red vessel", "q2": "nine", "q3": "never found"}
CORPUS = {"d1": "a vessel that is red", "d2": "nine of them", "d3": "over-long " * 40, "d4": "not found"}
RUN = {"q1": {"d1": 3.0, "d3": 2.0}, "q2": {"d3": 1.0, "d2": 0.5, "d1": 0.1}, "q3": {}}


@pytest.fixture(scope="module")
def first_stage() -> LLMQL:
    module = LLMQL("tiny-qwen3", "query_likelihood", encoder=ENCODER)
    module.configure_model()
    return module


def test_re_ranking_is_the_likelihood_of_each_pair(first_stage: LLMQL) -> None:
    found = first_stage.rerank(RUN, QUERIES, CORPUS)
    assert {query_id: set(scores) for query_id, scores in found.items()} == {
        "q1": {"d1", "d3"},
        "q2": {"d1", "d2", "d3"},
    }
    end = first_stage.encoder.text_tokenizer.eos_id
    for query_id, scores in found.items():
        target = [*first_stage.encoder.text_tokenizer.plain([QUERIES[query_id]])[0], end]
        for doc_id, score in scores.items():
            document = first_stage.encoder.tokenize([CORPUS[doc_id]], "passage")
            assert (len(document.ids), int(document.ids[-1])) == (document.lengths[0], end)
            expected = first_stage.likelihood.pair_log_likelihood(document, Tokens.from_lists([target]))
            assert score == pytest.approx(float(expected.detach()), abs=1e-4)
    assert first_stage.rerank({"q3": {}}, QUERIES, CORPUS) == {}


def test_re_ranking_in_blocks_and_without_the_end_token(first_stage: LLMQL, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = first_stage.rerank(RUN, QUERIES, CORPUS)
    monkeypatch.setattr("lit_embed.methods.llm_ql.RERANK_QUERIES", 1)
    blocks = first_stage.rerank(RUN, QUERIES, CORPUS)
    for query_id, scores in whole.items():
        assert blocks[query_id] == pytest.approx(scores, abs=1e-5)
    monkeypatch.setattr(first_stage, "score_end", False)
    shorter = first_stage.rerank(RUN, QUERIES, CORPUS)
    assert all(shorter[query_id][doc_id] > score for query_id in whole for doc_id, score in whole[query_id].items())


def test_both_stages_need_a_decoder_that_pools_its_end() -> None:
    for stage in ("query_likelihood", "contrastive"):
        with pytest.raises(InputError, match="bidirectional"):
            LLMQL("tiny-bert", stage, encoder=EncoderConfig()).configure_model()  # type: ignore[arg-type]


def test_the_stage_decides_on_batches(first_stage: LLMQL) -> None:
    train, val = first_stage.pair_collator(train=True), first_stage.pair_collator(train=False)
    assert isinstance(train, LikelihoodCollator)
    assert (train.rate, train.shuffled, val.rate, val.shuffled) == (0.6, False, 0.0, True)
    contrastive = LLMQL("tiny-qwen3")
    contrastive.configure_model()
    assert isinstance(contrastive.pair_collator(train=True), PairCollator)


def test_both_stages_wrap_texts_alike_and_the_second_starts_from_the_first(first_stage: LLMQL, tmp_path: Path) -> None:
    first_stage.export(tmp_path / "first")
    second = LLMQL(str(tmp_path / "first"), "contrastive", encoder=ENCODER)
    second.configure_model()
    for kind in ("query", "passage"):
        texts = list(CORPUS.values())
        ours, theirs = first_stage.encoder.tokenize(texts, kind), second.encoder.tokenize(texts, kind)  # type: ignore[arg-type]
        assert ours.lengths == theirs.lengths
        assert torch.equal(ours.ids, theirs.ids)
    vectors = first_stage.encoder.encode(list(CORPUS.values()), "passage")
    torch.testing.assert_close(second.encoder.encode(list(CORPUS.values()), "passage"), vectors, atol=1e-6, rtol=0)


def test_the_first_stage_exports_a_language_model_that_sentence_transformers_settings_describe(
    first_stage: LLMQL, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    first_stage.export(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = first_stage.likelihood.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    assert build_encoder(str(tmp_path / "out")).config.pooling == "last"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corruption": 1.5}, r"corruption must be a probability, got 1\.5"),
        ({"encoder": EncoderConfig("mean")}, "LLM-QL pools the end token: pooling must be eos or last, got mean"),
        ({"temperature": 0}, "temperature must be above 0"),
    ],
)
def test_bad_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LLMQL("tiny-qwen3", **settings)


def test_the_first_stage_needs_a_decoder() -> None:
    with pytest.raises(InputError, match=r"LLM-QL needs a causal language model, 'tiny-bert' is bidirectional"):
        LLMQL("tiny-bert", "query_likelihood", schedule=Schedule()).configure_model()
