"""Rewards of responses: at once, in worker processes with a time limit, or from a reward model."""

from collections.abc import Callable, Sequence

from lit_core.errors import InputError
from lit_rl.problems import Problem
from lit_rl.rewards.tasks import TASKS, prepare, reward
from lit_rl.rewards.workers import RewardWorkers

SECONDS = 5.0  # for one response in a worker
WORKERS = 2

Dialogue = Sequence[dict[str, str]]


def answer_part(response: str, tag: str) -> str:
    """What stands behind the last ``<tag>`` of a response, up to ``</tag>`` where that follows.

    Thoughts before it are left out. A response without ``<tag>`` is taken whole, as is any with an empty tag.
    """
    _, opened, answer = response.rpartition(f"<{tag}>")
    return answer.partition(f"</{tag}>")[0] if tag and opened else response


class Scorer:
    """Computes rewards.

    Args:
        workers: Processes for slow tasks; 0 computes in this one, without a limit.
        seconds: Limit for each response of a slow task.
        judge: Rewards of dialogues, for the task ``preference``.
        answer_tag: Only what responses have in it is rewarded, see :func:`answer_part`; empty takes all of them.
    """

    def __init__(
        self,
        workers: int = WORKERS,
        seconds: float = SECONDS,
        judge: Callable[[Sequence[Dialogue]], list[float]] | None = None,
        answer_tag: str = "",
    ) -> None:
        self.workers, self.seconds, self.judge, self.answer_tag = workers, seconds, judge, answer_tag
        self.pool: RewardWorkers | None = None

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """Reward of each response.

        Raises:
            InputError: The task ``preference`` without a reward model.
        """
        responses = self.answers(responses)
        found = [0.0] * len(problems)
        slow, judged = list[int](), list[int]()
        for number, (problem, response) in enumerate(zip(problems, responses, strict=True)):
            if problem.task == "preference":
                judged.append(number)
            elif TASKS[problem.task].slow:
                slow.append(number)
            else:
                found[number] = reward(problem.task, problem.row, response)
        if slow:
            if self.pool is None:
                self.pool = RewardWorkers(reward, self.workers, self.seconds, prepare)
            samples = [(problems[n].task, dict(problems[n].row), responses[n]) for n in slow]
            for number, value in zip(slow, self.pool.evaluate(samples), strict=True):
                found[number] = value
        if judged:
            if self.judge is None:
                raise InputError("the task 'preference' needs a reward model: --model.reward_model FOLDER")
            dialogues = [
                [{"role": "user", "content": problems[n].prompt}, {"role": "assistant", "content": responses[n]}]
                for n in judged
            ]
            for number, value in zip(judged, self.judge(dialogues), strict=True):
                found[number] = value
        return found

    def answers(self, responses: Sequence[str]) -> list[str]:
        """The parts of responses that are rewarded."""
        return [answer_part(response, self.answer_tag) for response in responses]

    def close(self) -> None:
        """End the worker processes."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None
