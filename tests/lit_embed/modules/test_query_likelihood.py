"""Query likelihood (LLM-QL, sections 2.2 to 2.7): every form against plain code over full logits in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_core.backbones import BackboneConfig, Lora, load_backbone, unwrap
from lit_core.errors import InputError
from lit_core.lm_head import cross_entropy
from lit_core.presets import preset_config
from lit_core.tokens import Tokens
from lit_embed.modules.query_likelihood import LossScope, QueryLikelihood

FORMS: list[Any] = ["split", "two_pass", "dense"]
SCOPES: list[LossScope] = ["query", "document_and_query"]
END, PAD = 9, 0
MODELS = ("tiny-qwen3", "tiny-llama")  # 4 query heads on 2 key heads; Qwen3 also normalises queries and keys


def _pairs(documents: list[int], queries: list[int]) -> tuple[Tokens, Tokens]:
    """Random tokens, each row ending with the end token, which also occurs inside rows and must not be searched for."""
    generator = torch.Generator().manual_seed(0)

    def rows(lengths: list[int]) -> Tokens:
        drawn = [torch.randint(1, 30, (length - 1,), generator=generator).tolist() for length in lengths]
        return Tokens.from_lists([[*row, END] for row in drawn])

    return rows(documents), rows(queries)


DOCUMENTS, QUERIES = _pairs([5, 9, 2, 7], [4, 2, 6, 3])


def _model(name: str, attention: Any = "sdpa", **config: Any) -> Any:
    model: Any = load_backbone(name, "causal_lm", BackboneConfig(attention=attention, **config))
    return model.double().train()


def _likelihood(name: str, form: Any, stop: bool = True, budget: int = 40, **config: Any) -> QueryLikelihood:
    return QueryLikelihood(_model(name, **config), PAD, form, stop, budget)


def _gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in unwrap(module).named_parameters() if p.grad is not None}


def _allowed(row: int, column: int, end: int, stop: bool) -> bool:
    return column <= row and not (stop and row > end and column < end)


def _plain_log_probs(model: Any, document: list[int], query: list[int], stop: bool = True) -> list[float]:
    """Log-probability of every token but the first of one pair, by eager attention and a softmax written out."""
    row, end = document + query, len(document) - 1
    mask = torch.tensor([[_allowed(i, j, end, stop) for j in range(len(row))] for i in range(len(row))])
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e300)[None, None]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row]), attention_mask=additive).logits[0].tolist()
    return [logits[at - 1][row[at]] - math.log(sum(math.exp(z) for z in logits[at - 1])) for at in range(1, len(row))]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stop", [True, False])
def test_every_form_equals_plain_code_over_full_logits(name: str, stop: bool) -> None:
    model = _model(name, "eager")
    pairs = list(zip(DOCUMENTS.ids.split(DOCUMENTS.lengths), QUERIES.ids.split(QUERIES.lengths), strict=True))
    expected = [_plain_log_probs(model, d.tolist(), q.tolist(), stop) for d, q in pairs]
    queries = [sum(values[-len(q) :]) for values, (_, q) in zip(expected, pairs, strict=True)]
    labels = sum(QUERIES.lengths)
    every = [value for values in expected for value in values]
    for form in FORMS:
        likelihood = _likelihood(name, form, stop)
        found = likelihood.pair_log_likelihood(DOCUMENTS, QUERIES).tolist()
        assert found == pytest.approx(queries, abs=2e-5)  # losses are float32
        assert float(likelihood(DOCUMENTS, QUERIES).detach()) == pytest.approx(-sum(queries) / labels, abs=2e-6)
        both = float(likelihood(DOCUMENTS, QUERIES, "document_and_query").detach())
        assert both == pytest.approx(-sum(every) / len(every), abs=2e-6)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MODELS)
def test_forms_agree_in_states_and_gradients(name: str, scope: LossScope) -> None:
    states, labels, gradients = [], [], []
    for form in FORMS:
        likelihood = _likelihood(name, form, budget=10_000)
        chosen = likelihood.label_states(DOCUMENTS, QUERIES, [1, 0, 3, 2], scope)
        found = {tuple(state): int(label) for state, label in zip(chosen[0].tolist(), chosen[1], strict=True)}
        states.append(chosen[0][chosen[0][:, 0].argsort()])  # the forms list them in their own order
        labels.append([found[tuple(state)] for state in states[-1].tolist()])
        gradients.append(_gradients(likelihood, likelihood(DOCUMENTS, QUERIES, scope)))
    for other in (1, 2):
        torch.testing.assert_close(states[other], states[0], rtol=0, atol=1e-10)
        assert labels[other] == labels[0]
        assert gradients[other].keys() == gradients[0].keys()
        for key, value in gradients[0].items():
            torch.testing.assert_close(gradients[other][key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_change_nothing(form: Any) -> None:
    expected = _likelihood("tiny-qwen3", form, budget=10_000)(DOCUMENTS, QUERIES)
    for budget in (1, 12):
        found = _likelihood("tiny-qwen3", form, budget=budget)(DOCUMENTS, QUERIES)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_a_row(form: Any) -> None:
    """E3: row [d1 d2 d3 d4 E q1 q2 end]; which states predict what."""
    documents, queries = Tokens.from_lists([[11, 12, 13, 14, END]]), Tokens.from_lists([[21, 22, END]])
    likelihood = _likelihood("tiny-llama", form)
    states, labels = likelihood.label_states(documents, queries, [0], "query")
    assert labels.tolist() == [21, 22, END]
    every, all_labels = likelihood.label_states(documents, queries, [0], "document_and_query")
    assert all_labels.tolist() == [12, 13, 14, END, 21, 22, END]
    torch.testing.assert_close(every[4:], states, rtol=0, atol=1e-12)  # rows 4, 5, 6
    plain = _model("tiny-llama").model(input_ids=documents.pad([0], PAD)[0]).last_hidden_state[0]
    torch.testing.assert_close(every[:5], plain, rtol=0, atol=1e-10)  # E8 (iii): rows up to E are plain causal ones


def test_loss_of_known_logits() -> None:
    """E4: the head is the identity, so that states are logits."""
    logits = torch.tensor([[2.0, 0, 1, 0], [0, 1, 0, 3], [1, 1, 1, 1]])
    loss = cross_entropy(logits, torch.eye(4), torch.tensor([0, 3, 2]))
    assert float(loss) == pytest.approx(0.697035, abs=1e-6)
    values = logits.log_softmax(1)[torch.arange(3), torch.tensor([0, 3, 2])]
    assert values.tolist() == pytest.approx([-0.493812, -0.210998, -1.386294], abs=1e-6)
    assert float(values.sum()) == pytest.approx(-2.091104, abs=1e-6)


class _EndColumns:
    """Records, then replaces, what one position gives to all later ones: its keys and values in every layer."""

    def __init__(self, model: Any, position: int) -> None:
        self.position, self.found, self.replace = position, dict[str, Tensor](), False
        for number, layer in enumerate(model.model.layers):
            for kind in ("k_proj", "v_proj"):
                getattr(layer.self_attn, kind).register_forward_hook(self._hook(f"{number}.{kind}"))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if not self.replace:
                self.found[name] = output[:, self.position].detach().clone()
                return output
            output = output.clone()
            output[:, self.position] = self.found[name]
            return output

        return hook


@pytest.mark.parametrize(
    ("form", "stop", "same"), [("split", True, True), ("dense", True, True), ("dense", False, False)]
)
@torch.no_grad()
def test_queries_see_the_document_through_its_end_column_alone(form: Any, stop: bool, same: bool) -> None:
    """E8 (i) and (iv): with the end token's keys and values held fixed, another document changes no query state."""
    likelihood = _likelihood("tiny-qwen3", form, stop)
    columns = _EndColumns(likelihood.model, position=4)
    queries = Tokens.from_lists([[21, 22, 23, END]])
    first = likelihood.label_states(Tokens.from_lists([[11, 12, 13, 14, END]]), queries, [0], "query")[0]
    columns.replace = True
    again = likelihood.label_states(Tokens.from_lists([[15, 16, 17, 18, END]]), queries, [0], "query")[0]
    difference = (first - again)[1:].abs().max()  # the first state is the end token's own
    assert (difference < 1e-12) == same
    columns.replace = False
    free = likelihood.label_states(Tokens.from_lists([[15, 16, 17, 18, END]]), queries, [0], "query")[0]
    assert (first - free)[1:].abs().max() > 1e-4  # without holding it fixed, the document does matter


@pytest.mark.parametrize(("form", "stop"), [("split", True), ("dense", True), ("dense", False)])
def test_no_gradient_flows_from_a_query_to_document_keys(form: Any, stop: bool) -> None:
    """E8 (ii): in the last layer, keys of document tokens serve no query row."""
    likelihood = _likelihood("tiny-llama", form, stop)
    keys: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        keys.append(output)

    likelihood.model.model.layers[-1].self_attn.k_proj.register_forward_hook(keep)
    documents, queries = Tokens.from_lists([[11, 12, 13, 14, END]]), Tokens.from_lists([[21, 22, 23, END]])
    states, _ = likelihood.label_states(documents, queries, [0], "query")
    states[1:].sum().backward()  # the first state is the end token's, which does see the document
    assert keys[0].grad is not None
    norms = keys[0].grad[0].norm(dim=1)
    assert bool((norms[:4] == 0).all()) == stop
    assert float(norms[4]) > 0


def test_scores_from_cached_columns_are_those_of_the_pairs() -> None:
    likelihood = _likelihood("tiny-qwen3", "split").eval()
    columns = likelihood.columns(DOCUMENTS)
    pairs = torch.tensor([[query, document] for query in range(4) for document in (3, 0, 2, 1)])
    scores = likelihood.score(columns, pairs, QUERIES)
    for (query, document), score in zip(pairs.tolist(), scores.tolist(), strict=True):
        one = Tokens(DOCUMENTS.ids.split(DOCUMENTS.lengths)[document], [DOCUMENTS.lengths[document]])
        other = Tokens(QUERIES.ids.split(QUERIES.lengths)[query], [QUERIES.lengths[query]])
        assert score == pytest.approx(float(likelihood.pair_log_likelihood(one, other).detach()), abs=2e-5)
    assert columns.keys_values.shape == (4, 3, 2, 2, 32)  # documents, layers, keys and values, key heads, width
    assert columns.end_index.tolist() == [4, 8, 1, 6]


def test_the_query_s_end_token_can_be_left_out() -> None:
    likelihood = _likelihood("tiny-llama", "split").eval()
    columns, pairs = likelihood.columns(DOCUMENTS), torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3]])
    without = likelihood.score(columns, pairs, QUERIES, keep_end=False)
    model = _model("tiny-llama", "eager")
    for number, (document, query) in enumerate(
        zip(DOCUMENTS.ids.split(DOCUMENTS.lengths), QUERIES.ids.split(QUERIES.lengths), strict=True)
    ):
        expected = sum(_plain_log_probs(model, document.tolist(), query.tolist())[-len(query) : -1])
        assert float(without[number]) == pytest.approx(expected, abs=2e-5)


def test_checkpointing_keeps_the_gradients_of_split_and_is_refused_by_two_pass() -> None:
    plain, recomputed = (
        _likelihood("tiny-qwen3", "split", gradient_checkpointing=checkpointing) for checkpointing in (False, True)
    )
    expected = _gradients(plain, plain(DOCUMENTS, QUERIES))
    found = _gradients(recomputed, recomputed(DOCUMENTS, QUERIES))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9)
    two_pass = _likelihood("tiny-qwen3", "two_pass", gradient_checkpointing=True)
    with pytest.raises(InputError, match="form two_pass needs the key-value cache"):
        two_pass(DOCUMENTS, QUERIES)


@pytest.mark.parametrize("form", FORMS)
def test_adapters_take_part(form: Any) -> None:
    model: Any = load_backbone("tiny-qwen3", "causal_lm", lora=Lora(r=2, dropout=0.0))
    likelihood = QueryLikelihood(model, PAD, form)
    likelihood(DOCUMENTS, QUERIES).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(value is not None and value.abs().sum() > 0 for name, value in gradients.items() if "lora_B" in name)


def test_an_untied_head_is_trained_too() -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(preset_config("tiny-llama", tie_word_embeddings=False)).double()
    losses = [QueryLikelihood(model, PAD, form)(DOCUMENTS, QUERIES) for form in ("dense", "two_pass", "split")]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(losses[2], losses[0], rtol=0, atol=1e-6)
    losses[2].backward()
    assert model.lm_head.weight.grad is not None


def test_split_needs_sdpa() -> None:
    with pytest.raises(InputError, match="form split needs sdpa attention, got eager; use form dense"):
        QueryLikelihood(_model("tiny-llama", "eager"), PAD, "split")


def test_the_split_attention_function_is_the_ordinary_one_without_a_layout() -> None:
    """An encoder that shares the model keeps its vectors."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = _model("tiny-qwen3").model(input_ids=ids, attention_mask=mask).last_hidden_state
    found = _likelihood("tiny-qwen3", "split").model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-12)
