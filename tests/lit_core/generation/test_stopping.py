from typing import Any

import pytest
import torch

from lit_core.generation import SamplingParams, TorchEngine
from lit_core.generation.stopping import StopStrings, stop_strings
from lit_core.presets import VOCAB_SIZE, preset_config, preset_tokenizer

TOKENIZERS = {name: preset_tokenizer(name) for name in ("tiny-qwen3", "tiny-llama")}


def ids(text: str, name: str = "tiny-qwen3") -> list[int]:
    """Tokens of a text that goes on behind another one."""
    return TOKENIZERS[name].encode(text, add_special_tokens=False)


def stopped_at(strings: tuple[str, ...], prompt: list[int], response: list[int], name: str = "tiny-qwen3") -> int:
    """Tokens of a response up to the one that ends it, as the engine asks for it; -1 where none does."""
    stops = StopStrings(strings, TOKENIZERS[name], VOCAB_SIZE)
    for count in range(1, len(response) + 1):
        if stops.candidates(torch.tensor(response[count - 1 : count])) == [0] and stops.completed(
            [*prompt, *response[:count]], len(prompt)
        ):
            return count
    return -1


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize(
    ("strings", "text", "ending"),
    [
        (("three",), "one two three four", "one two three"),
        (("two three",), "one two three four", "one two three"),  # over two tokens
        ((" two",), "one two three", "one two"),
        ((" one",), "one two", "one"),  # the blank that the first word has behind a prompt
        (("two ",), "one two of three", "one two of"),  # the blank belongs to the next word
        (("\n\n",), "one\n\ntwo", "one\n\n"),
        (("zzz", "é"), "un café noir", "un café"),
        (("雪",), "a 雪 b", "a 雪"),  # of several tokens, none of which is a character
        (("\U0001f600!",), "a \U0001f600! b", "a \U0001f600!"),
        (("four",), "one two three", None),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    name: str, strings: tuple[str, ...], text: str, ending: str | None
) -> None:
    response = ids(text, name)
    found = stopped_at(strings, ids("Tell me:", name), response, name)
    assert found == (-1 if ending is None else len(ids(ending, name)))


def test_every_split_of_a_stop_string_is_found() -> None:
    """A model need not write a text in the tokens that a tokenizer would choose."""
    letters = {character: ids(f"x{character}")[-1] for character in "abc"}
    merged = [token for token in range(VOCAB_SIZE) if TOKENIZERS["tiny-qwen3"].decode([5, token]).endswith("ab")]
    spelled = [letters[character] for character in "cab"]
    assert stopped_at(("cab",), ids("x"), [*spelled, *spelled]) == 3
    assert merged
    for token in merged:
        assert stopped_at(("ab",), ids("x"), [letters["c"], token, letters["c"]]) == 2


def test_a_stop_string_lies_in_the_response_and_is_completed_by_a_new_token() -> None:
    tokenizer = TOKENIZERS["tiny-qwen3"]
    stops = StopStrings(("end end",), tokenizer, VOCAB_SIZE)
    end = ids("the end")[-1]
    assert stops.completed([5, end, end], 1)
    assert not stops.completed([5, end, end], 2)  # half of it is the prompt's
    assert not stops.completed([5, end, end, *ids("of")], 1)  # it stood there before
    assert stops.completed([5, end, end, end], 1)  # a second one, over the first
    assert stops.completed([*range(300), end, end], 300)


def test_special_tokens_can_be_stop_strings() -> None:
    token = TOKENIZERS["tiny-qwen3"].eos_token_id
    assert stopped_at(("<|im_end|>",), ids("a"), [*ids("b"), token, token]) == len(ids("b")) + 1


def test_only_tokens_with_a_last_character_are_decoded() -> None:
    stops = StopStrings(("Observation:",), TOKENIZERS["tiny-qwen3"], VOCAB_SIZE + 100)
    tokens = [ids("a:")[-1], ids("Observation")[-1], VOCAB_SIZE + 50]
    assert stops.candidates(torch.tensor(tokens)) == [0]
    assert int(stops.could_end.sum()) < 20


def test_a_vocabulary_is_looked_through_once() -> None:
    tokenizer = TOKENIZERS["tiny-llama"]
    assert stop_strings(("a",), tokenizer, VOCAB_SIZE) is stop_strings(("a",), tokenizer, VOCAB_SIZE)
    assert stop_strings(("a",), tokenizer, VOCAB_SIZE) is not stop_strings(("b",), tokenizer, VOCAB_SIZE)


@pytest.mark.parametrize("generic", [False, True])
def test_the_engine_stops_at_the_first_completed_string(generic: bool) -> None:
    model, tokenizer = _model(), TOKENIZERS["tiny-qwen3"]
    rollouts = TorchEngine(model, tokenizer, generic=generic)
    prompts = [ids("Tell me"), ids("Why"), ids("one two three")]
    free = rollouts.generate(prompts, SamplingParams(max_tokens=30), samples=4)
    strings = tuple(tokenizer.decode([5, *completion.tokens[8:10]])[1:] for completion in free[::5])
    params = SamplingParams(max_tokens=30, stop_strings=strings)
    found = rollouts.generate(prompts, params, samples=4)
    for number, (whole, completion) in enumerate(zip(free, found, strict=True)):
        end = stopped_at(strings, prompts[number // 4], whole.tokens)
        assert completion.tokens == (whole.tokens if end < 0 else whole.tokens[:end])
        assert completion.finish_reason == ("length" if end < 0 else "stop")
    assert all(found[number].finish_reason == "stop" for number in (0, 5, 10))
    rest = rollouts.generate(prompts[:1], params, prefixes=[free[0].tokens[:9]])[0]  # the string begins in the prefix
    assert (rest.tokens, rest.finish_reason) == (free[0].tokens[9:10], "stop")


def _model() -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(preset_config("tiny-qwen3")).eval()
