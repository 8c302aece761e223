"""Trees that grow a response at a time, or some at a time, from positions of finished responses."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_core.generation import Branch, Response
from lit_core.samplers import mix_seed
from lit_rl.modules.trees.config import FROM_LOGITS, TreeConfig

COIN, PLACE = 101, 102  # names of the streams of random numbers, apart from those of the draws


def scores_of(response: Response, score: str) -> Tensor:
    """Score of each position of a response, float32 ``(T,)``."""
    return response.scalars[score] if score in FROM_LOGITS else -response.log_probs


class Branching:
    """One response a round: from the prompt with probability epsilon, else from the best position of all (ROSE, 2.2).

    Of equal positions the first one of the first response is taken. The coin and the draws depend on the seed, the
    problem and the number of the response alone.

    Args:
        config: Score and what is left out.
        samples: Responses a prompt.
        seed: Of this rollout.
        ids: Of each prompt's problem.
    """

    width = 1

    def __init__(self, config: TreeConfig, samples: int, seed: int, ids: Sequence[int]) -> None:
        self.config, self.responses, self.seed, self.ids = config, samples, seed, ids
        self.best: dict[int, tuple[float, int, int]] = {}  # score, response and position, by prompt

    def __call__(self, prompt: int, responses: Sequence[Response]) -> list[Branch]:
        number, problem = len(responses), self.ids[prompt]
        if number == self.responses:
            return []
        draw = mix_seed(self.seed, problem, number)
        if responses:
            self._look_at(prompt, responses)
        if not responses or prompt not in self.best or self._coin(problem, number) < self.config.epsilon:
            return [Branch(draw)]
        if self.config.score == "random":
            parent, position = self._anywhere(problem, responses)
        else:
            _, parent, position = self.best[prompt]
        return [Branch(draw, parent, position)]

    def _coin(self, problem: int, number: int) -> float:
        return random.Random(mix_seed(self.seed, problem, number, COIN)).random()

    def _look_at(self, prompt: int, responses: Sequence[Response]) -> None:
        """Take the newest response into account; with used nodes left out, all of them again."""
        if self.config.unique_positions:
            self.best.pop(prompt, None)
            newest = range(len(responses))
        else:
            newest = range(len(responses) - 1, len(responses))
        for number in newest:
            places = self._eligible(responses, number)
            if not places:
                continue
            values = scores_of(responses[number], self.config.score).numpy()[places]
            first = int(values.argmax())  # the first of equal ones
            if values[first] > self.best.get(prompt, (-np.inf,))[0]:
                self.best[prompt] = (float(values[first]), number, places[first])

    def _eligible(self, responses: Sequence[Response], number: int) -> list[int]:
        """A response's own positions that a branch may begin at; those before are its parent's, which comes first."""
        response = responses[number]
        end = self.config.skip_end and response.finish_reason == "stop"
        last = len(response.tokens) - max(int(end), self.config.skip_last)
        places = list(range(response.position, last))
        if self.config.unique_positions:
            used = {other.position for other in responses if other.parent == number}
            if response.parent is not None:
                used.add(response.position)  # the node that it left its parent at
            places = [place for place in places if place not in used]
        return places

    def _anywhere(self, problem: int, responses: Sequence[Response]) -> tuple[int, int]:
        """A position of the tree, each as likely as any other."""
        places = [
            (number, position) for number in range(len(responses)) for position in self._eligible(responses, number)
        ]
        generator = random.Random(mix_seed(self.seed, problem, len(responses), PLACE))
        return places[generator.randrange(len(places))]


class Rounds:
    """Some chains, then rounds in which every chain's tree branches at some positions (EPTree, Tree-GRPO).

    EPTree branches where the drawn tokens were least probable; the first token of a branch is not drawn anew.
    Tree-GRPO has one round, at random positions.

    Args:
        config: Chains, points, rounds, children.
        seed: Of this rollout.
        ids: Of each prompt's problem.
    """

    def __init__(self, config: TreeConfig, seed: int, ids: Sequence[int]) -> None:
        self.config, self.seed, self.ids = config, seed, ids
        self.at_random = config.sampler == "tree_grpo"
        self.rounds = 1 if self.at_random else config.rounds
        self.a_round = config.chains * config.points * config.children
        self.responses = config.chains + self.rounds * self.a_round
        self.width = max(config.chains, self.a_round)

    def __call__(self, prompt: int, responses: Sequence[Response]) -> list[Branch]:
        config, problem, have = self.config, self.ids[prompt], len(responses)
        if have == 0:
            return [Branch(mix_seed(self.seed, problem, number)) for number in range(config.chains)]
        if have == self.responses:
            return []
        roots = _roots(responses)
        places: list[tuple[int, int]] = []
        for chain in range(config.chains):
            places += self._points(problem, responses, [n for n in range(have) if roots[n] == chain])
        chosen = [place for place in places for _ in range(config.children)]
        return [Branch(mix_seed(self.seed, problem, have + k), *place) for k, place in enumerate(chosen)]

    def _points(self, problem: int, responses: Sequence[Response], tree: Sequence[int]) -> list[tuple[int, int]]:
        """Positions of one tree; the best ones repeat where it has too few."""
        found = []
        for number in tree:
            response = responses[number]
            first = response.position + (response.parent is not None)  # not the branch's first token again
            found += [(number, position) for position in range(first, len(response.tokens))]
        found = found or [(tree[0], 0)]
        if self.at_random:
            random.Random(mix_seed(self.seed, problem, tree[0], PLACE)).shuffle(found)
        else:
            found.sort(key=lambda place: float(responses[place[0]].log_probs[place[1]]))  # stable: the first of equals
        return [found[number % len(found)] for number in range(self.config.points)]


def _roots(responses: Sequence[Response]) -> list[int]:
    """Response that each one's tree began with."""
    roots: list[int] = []
    for number, response in enumerate(responses):
        roots.append(number if response.parent is None else roots[response.parent])
    return roots


def lineage(responses: Sequence[Response]) -> tuple[Tensor, Tensor]:
    """Parents (-1 for none) and branches of a tree in which every response is whole, Long ``(N,)`` each.

    A response that left its parent at the prompt has nothing of it.
    """
    parents = [-1 if r.parent is None or r.position == 0 else r.parent for r in responses]
    branches = [0 if parent < 0 else r.position for parent, r in zip(parents, responses, strict=True)]
    return torch.tensor(parents), torch.tensor(branches)
