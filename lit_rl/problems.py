"""Problems and the batches that a policy is trained and evaluated on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_core.errors import InputError

DOMAIN_SUMMARIES = ("domain_mean", "domain_worst")  # of the metrics of all domains; no domain has these names


@dataclass(frozen=True)
class Problem:
    """A prompt and what its reward depends on.

    Args:
        id: Identifies it in results, and in the seeds of its responses.
        task: Name of the task in ``lit_rl.rewards.tasks``.
        prompt: Text of the user's turn.
        row: Fields that the reward reads.
        solution: A response to imitate, where there is one.
        domain: Name of the domain that it belongs to, where there are several.
    """

    id: int
    task: str
    prompt: str
    row: Mapping[str, Any] = field(default_factory=dict)
    solution: str | None = None
    domain: str = ""


class ProblemBatch:
    """Problems with the token ids of their prompts, and of their solutions where they are to be imitated.

    It is no dataclass: lightning would look for tensors in each of its problems, and refuses frozen ones.

    Args:
        problems: The problems.
        prompts: Token ids of each prompt.
        solutions: Token ids of each solution.
    """

    def __init__(
        self, problems: list[Problem], prompts: list[list[int]], solutions: list[list[int]] | None = None
    ) -> None:
        self.problems, self.prompts, self.solutions = problems, prompts, solutions or []

    def __len__(self) -> int:
        return len(self.problems)

    def to(self, device: Any, non_blocking: bool = False) -> "ProblemBatch":
        """Stay on the host; lightning calls this for its batch transfer."""
        return self


@dataclass(frozen=True)
class PromptConfig:
    """How a prompt's text becomes tokens.

    Args:
        chat_template: Apply the tokenizer's chat template; None does so where it has one.
        system: Text of the system turn; empty has none.
        template: Text with ``{prompt}`` in it that takes the place of a chat template, for models that have learned
            none; empty has none.
        max_tokens: Problems with longer prompts are left out.
        answer_tag: Name of the tag that a response puts its answer in, such as ``response``; only what is in it is
            rewarded (see ``answer_part``). Empty rewards the whole response.
    """

    chat_template: bool | None = None
    system: str = ""
    template: str = ""
    max_tokens: int = 1024
    answer_tag: str = ""

    def __post_init__(self) -> None:
        if self.template and "{prompt}" not in self.template:
            raise InputError("needs {prompt}, where the prompt is put", field="prompt.template")
        if self.template and (self.chat_template or self.system):
            raise InputError("takes the place of chat_template and system: leave these out", field="prompt.template")


class PromptCollator:
    """Turns problems into a batch.

    Args:
        tokenizer: Of the policy.
        config: How.

    Raises:
        InputError: A chat template is asked for and the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if config.chat_template and not has_template:
            raise InputError("the tokenizer has no chat template", field="prompt.chat_template")
        self.templated = has_template and not config.template if config.chat_template is None else config.chat_template

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, ready for the response to follow."""
        texts = [self._text(prompt) for prompt in prompts]
        return self.tokenizer(texts, add_special_tokens=not self.templated)["input_ids"]  # a template has its own

    def _text(self, prompt: str) -> str:
        if self.config.template:
            return self.config.template.replace("{prompt}", prompt)
        if not self.templated:
            return f"{self.config.system}\n{prompt}" if self.config.system else prompt
        turns = [{"role": "system", "content": self.config.system}] if self.config.system else []
        turns.append({"role": "user", "content": prompt})
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def solution_ids(self, problem: Problem) -> list[int]:
        """Token ids of a problem's solution, the end token included.

        Raises:
            InputError: It has none.
        """
        if problem.solution is None:
            raise InputError(f"problem {problem.id} has no solution to imitate", field="solution")
        ids = self.tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def __call__(self, problems: Sequence[Problem]) -> ProblemBatch:
        return ProblemBatch(list(problems), self.ids([problem.prompt for problem in problems]))


class DemonstrationCollator(PromptCollator):
    """Turns problems into a batch with their solutions."""

    def __call__(self, problems: Sequence[Problem]) -> ProblemBatch:
        batch = super().__call__(problems)
        batch.solutions = [self.solution_ids(problem) for problem in problems]
        return batch
