from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lit_core.backbones import BackboneConfig, Lora
from lit_core.errors import InputError
from lit_core.generation import Response
from lit_rl.functional.tree_advantages import rose
from lit_rl.modules.config import ExplorationConfig, LossConfig, RolloutConfig, UpdateConfig
from lit_rl.modules.policy import Policy
from lit_rl.modules.rollouts import Rollout, collect, informative, joined, response_text, scored
from lit_rl.modules.scoring import Scorer, answer_part
from lit_rl.problems import DemonstrationCollator, Problem, ProblemBatch, PromptCollator, PromptConfig

CPU = torch.device("cpu")
PROBLEMS = [Problem(number, "preference", f"say {number}") for number in (4, 9, 2)]


class Lengths(Scorer):
    """Rewards texts by their number of characters, modulo 3."""

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        return [float(len(response) % 3) for response in responses]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy("nano-qwen3", BackboneConfig(seed=1), Lora())


def batch(policy: Policy, problems: Sequence[Problem] = PROBLEMS) -> ProblemBatch:
    return PromptCollator(policy.tokenizer, PromptConfig())(problems)


def roll(policy: Policy, problems: Sequence[Problem] = PROBLEMS, seed: int = 3, **settings: Any) -> Rollout:
    config = RolloutConfig(**{"samples": 4, "max_tokens": 6, "stop_strings": ["a", "e"], **settings})
    return collect(policy, batch(policy, problems), config, seed, Lengths(), CPU)


def test_rows_hold_what_was_drawn(policy: Policy) -> None:
    found = roll(policy)
    assert len(found) == 12
    assert list(found.sequences.groups) == [0] * 4 + [1] * 4 + [2] * 4 == found.group_ids.tolist()
    assert [problem.id for problem in found.problems] == [4] * 4 + [9] * 4 + [2] * 4
    lengths = [len(response) for response in found.sequences.responses]
    assert found.mask.sum(1).tolist() == lengths
    assert len(set(lengths)) > 2
    for row, length in enumerate(lengths):
        assert found.responses[row, :length].tolist() == list(found.sequences.responses[row])
        assert found.mask[row, :length].all()
        assert found.truncated[row] == (length == 6 and not {"a", "e"} & set(found.texts[row]))
        assert found.texts[row] == policy.tokenizer.decode(found.sequences.responses[row])
    assert (found.responses[~found.mask] == 0).all()
    assert (found.log_probs[~found.mask] == 0).all()
    assert found.scores.tolist() == found.rewards == [len(text) % 3 for text in found.texts]


def test_a_problems_responses_depend_on_seed_and_id_alone(policy: Policy) -> None:
    found, turned = roll(policy), roll(policy, PROBLEMS[::-1])
    assert found.texts[:4] == turned.texts[8:]
    assert found.texts[8:] == turned.texts[:4]
    assert roll(policy, seed=4).texts != found.texts
    assert len(set(found.texts)) == 12  # the samples of a problem differ


def test_token_0_is_a_token_like_any_other(policy: Policy) -> None:
    """It neither shortens a response nor takes its last tokens out of the advantages (ROSE card, section 9.2)."""
    ids = [5, 0, 7, 0, 9]
    drawn = [Response(None, 0, ids, -torch.ones(5), "stop", {}), Response(None, 0, [5, 6], -torch.ones(2), "stop", {})]
    config = RolloutConfig(samples=2, max_tokens=6)
    found = scored(policy, PROBLEMS[:1] * 2, [[1]], [0, 0], drawn, config, Lengths(), CPU)
    assert found.mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    advantages = rose(found.forest, torch.tensor([1.0, 0.0]), found.mask)
    assert advantages.tolist() == [[0.5] * 5, [-0.5, -0.5, 0, 0, 0]]


def test_long_responses_lose_score_and_keep_their_reward(policy: Policy) -> None:
    plain, shaped = roll(policy), roll(policy, overlong_buffer=4, overlong_factor=2.0)
    lengths = plain.mask.sum(1)
    penalty = {1: 0.0, 2: 0.0, 3: -0.5, 4: -1.0, 5: -1.5, 6: -2.0}
    assert shaped.rewards == plain.rewards
    expected = [score + penalty[int(n)] for score, n in zip(plain.rewards, lengths, strict=True)]
    assert shaped.scores.tolist() == pytest.approx(expected)


def test_the_end_token_is_no_text_and_other_special_tokens_are(policy: Policy) -> None:
    end = policy.tokenizer.eos_token_id
    other = policy.tokenizer.convert_tokens_to_ids("<|im_start|>")
    words = policy.tokenizer("1 2", add_special_tokens=False)["input_ids"]
    assert response_text(policy, [*words, end]) == "1 2"
    assert response_text(policy, [other, *words]) == "<|im_start|> 1 2"
    assert response_text(policy, [end]) == ""


def test_groups_with_different_rewards_are_informative(policy: Policy) -> None:
    found = roll(policy)
    found.rewards = [1.0, 1.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 1.0, 1.0]
    assert informative(found) == [0, 1, 2, 3, 8, 9, 10, 11]
    found.scores = torch.rand(12)  # what is lost by length does not make a group informative
    assert informative(found) == [0, 1, 2, 3, 8, 9, 10, 11]
    found.sequences.groups = list(range(12))
    assert informative(found) == []


def test_rollouts_are_cut_and_put_together(policy: Policy) -> None:
    first, second = roll(policy), roll(policy, seed=5, max_tokens=3)
    assert second.mask.shape[1] == 3
    second.sequences.groups = [group + 3 for group in second.sequences.groups]
    whole = joined([first, second])
    assert len(whole) == 24
    assert whole.group_ids.tolist() == [row // 4 for row in range(24)]
    assert whole.mask.shape == whole.responses.shape == whole.log_probs.shape == (24, 6)
    assert whole.mask.sum(1).tolist() == [*first.mask.sum(1).tolist(), *second.mask.sum(1).tolist()]
    part = whole.take([20, 3])
    assert part.texts == [second.texts[8], first.texts[3]]
    assert part.rewards == part.scores.tolist() == [second.rewards[8], first.rewards[3]]
    assert (part.group_ids.tolist(), len(part.sequences.prompts)) == ([5, 0], 2)
    assert torch.equal(part.log_probs[0, :3], second.log_probs[8])
    assert joined([first]) is first


def test_prompts_and_solutions_become_tokens(policy: Policy) -> None:
    tokenizer = policy.tokenizer
    plain = PromptCollator(tokenizer, PromptConfig(system="be brief"))
    assert plain.ids(["1 2", "3"]) == [tokenizer(f"be brief\n{text}")["input_ids"] for text in ("1 2", "3")]
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        PromptCollator(tokenizer, PromptConfig(chat_template=True))
    problems = [Problem(0, "preference", "one", solution="3"), Problem(1, "preference", "two")]
    found = DemonstrationCollator(tokenizer, PromptConfig())(problems[:1])
    assert found.solutions == [[*tokenizer("3")["input_ids"], tokenizer.eos_token_id]]
    with pytest.raises(InputError, match="problem 1 has no solution to imitate"):
        DemonstrationCollator(tokenizer, PromptConfig())(problems)


def test_a_chat_template_is_applied() -> None:
    from lit_core.presets import preset_tokenizer

    tokenizer: Any = preset_tokenizer("nano-qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    found = PromptCollator(tokenizer, PromptConfig(system="be brief")).ids(["1 2"])
    text = "<|im_start|>system: be brief<|im_end|><|im_start|>user: 1 2<|im_end|><|im_start|>assistant:"
    assert found == [tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert PromptCollator(tokenizer, PromptConfig(chat_template=False)).ids(["1 2"]) == [tokenizer("1 2")["input_ids"]]


def test_rewards_keep_their_places_and_preferences_need_a_judge() -> None:
    row = {"numbers": [1, 2], "target": 3}
    bare = Problem(0, "countdown_bare", "", row)
    mixed = [bare, Problem(1, "preference", "hello"), bare]
    judged: list[Any] = []

    def judge(dialogues: Any) -> list[float]:
        judged.extend(dialogues)
        return [0.25] * len(dialogues)

    assert Scorer(0, judge=judge).rewards(mixed, ["1+2", "hi", "1-2"]) == [1.0, 0.25, 0.0]
    assert judged == [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]]
    with pytest.raises(InputError, match="the task 'preference' needs a reward model"):
        Scorer(0).rewards(mixed, ["1+2", "hi", "1-2"])


@pytest.mark.parametrize(
    ("response", "tag", "answer"),
    [
        ("<think>1</think><response>1+2</response> bye", "response", "1+2"),
        ("<response>no</response><response>1+2", "response", "1+2"),  # the last one, closed or not
        ("1+2</response>", "response", "1+2</response>"),  # never opened: all of it
        ("<response>1+2</response>", "", "<response>1+2</response>"),
        ("a <> b", "", "a <> b"),
    ],
)
def test_only_the_answer_of_a_response_is_rewarded(response: str, tag: str, answer: str) -> None:
    assert answer_part(response, tag) == answer
    problem = Problem(0, "countdown_bare", "", {"numbers": [1, 2], "target": 3})
    assert Scorer(0, answer_tag=tag).rewards([problem], [response]) == [float(answer == "1+2")]


def test_a_template_takes_the_place_of_the_chat_template(policy: Policy) -> None:
    config = PromptConfig(template="Q: {prompt}\nA: {")
    tokenizer = policy.tokenizer
    ids = PromptCollator(tokenizer, config).ids(["1 {prompt} 2"])
    assert ids == tokenizer(["Q: 1 {prompt} 2\nA: {"])["input_ids"]
    with pytest.raises(InputError, match=r"needs \{prompt\}"):
        PromptConfig(template="Q")
    with pytest.raises(InputError, match="takes the place of"):
        PromptConfig(template="{prompt}", system="be brief")


def test_slow_rewards_are_computed_in_workers() -> None:
    scorer = Scorer(workers=0)
    problems = [
        Problem(0, "math", "", {"answer": "#### 4"}),
        Problem(1, "countdown_bare", "", {"numbers": [4], "target": 4}),
    ]
    assert scorer.rewards(problems, ["so \\boxed{4}", "4"]) == [1.0, 1.0]
    assert scorer.pool is not None
    scorer.close()
    assert scorer.pool is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RolloutConfig(samples=0), "samples': must be at least 1, got 0"),
        (lambda: RolloutConfig(temperature=0.0), "temperature': must be above 0"),
        (lambda: RolloutConfig(samples=1, dynamic=True), "rollout.dynamic"),
        (lambda: LossConfig(kl="k1", kl_coef=0.1), "k1 has no gradient on average"),
        (lambda: LossConfig(dual_clip=1.0), "dual_clip': must be above 1"),
        (lambda: UpdateConfig(mini_batches=0), "mini_batches"),
        (lambda: ExplorationConfig(top_p=0.0), "top_p and share"),
        (lambda: ExplorationConfig(top_k=0), "top_k and cap"),
    ],
)
def test_settings_out_of_range_are_refused(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()
