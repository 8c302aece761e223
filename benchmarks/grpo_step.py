"""One GRPO step, rollout, reward and update, against TRL's ``GRPOTrainer``: ``python -m benchmarks.grpo_step``.

Both fit the same weights with their own trainer, in turn, without logging, validation or checkpoints. A step is what
passes from the end of one to the end of the next, loading included. Prompts of 8 to 120 tokens, 8 responses each at
temperature 1; one token in 24 ends a response, so that lengths are geometric, and none is longer than 96. The reward is
the parity of a text's length. AdamW at the same rate, one update a batch, no reference, float32. As the two draw other
tokens, times are compared for each token drawn.

TRL runs in two ways, both without recomputing activations (which is its default): ``TRL`` with the cache that
``generate`` takes by itself and the whole batch at once; ``TRL, tuned`` with what was fastest for it here, a static
cache and micro-batches of 8 responses.

Before, on a fixed batch, equal for both: losses and gradients of TRL's loss types and of our reductions.
"""

import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.harness import Timing, announce, arguments, print_table, texts, words_of_one_token
from benchmarks.policy_update import ENDS_ONE_IN, LONGEST, SAMPLES, attached, flat_gradient, gradients_of
from benchmarks.policy_update import random_sequences as sequences_of

PROMPT_TOKENS = (8, 120)
LEARNING_RATE, EPSILON, TASK = 1e-6, 1e-4, "parity"
MICRO_BATCH = 8
TARGET = 3.0
TOLERANCE = 1e-5
REDUCTIONS = {"dapo": "token_mean", "bnpo": "token_mean", "grpo": "seq_mean_token_mean", "dr_grpo": "const_norm"}
CLIPPING = ((0.2, 0.2, 0.0), (0.2, 0.28, 0.0), (0.2, 0.28, 0.1))  # low, high, weight of the divergence


CASES = {"Qwen3 3x128": (8, 32), "Qwen2 4x256": (8,)}  # prompts of a batch


def save_model(name: str, folder: str) -> Any:
    """Write a random model, its tokenizer and the tokens that end a response; returns the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from lit_core.presets import preset_config, preset_tokenizer

    config = preset_config("tiny-qwen3")
    if name.startswith("Qwen2"):
        config = Qwen2Config(
            vocab_size=config.vocab_size, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weights, parameter in model.named_parameters():  # larger than the usual start: predictions depend on the text
        if parameter.ndim == 2 and "embed" not in weights:
            parameter.data.mul_(4)
    tokenizer = preset_tokenizer("tiny-qwen3")
    ends = random.Random(0).sample(range(config.vocab_size - 8), config.vocab_size // ENDS_ONE_IN)
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def parity(text: str) -> float:
    """The reward: nothing to learn, but both values occur in most groups."""
    return float(len(text) % 2)


@dataclass
class Record:
    """What the steps of one side took; the first of each fit is left out.

    Args:
        steps: Whole steps.
        rollouts: Drawing and rewarding.
        tokens: Tokens drawn.
    """

    steps: Timing = field(default_factory=Timing)
    rollouts: Timing = field(default_factory=Timing)
    tokens: list[int] = field(default_factory=list)
    last: tuple[float, float] | None = None

    def timed(self, draw: Callable[..., Any], tokens_of: Callable[[Any], int]) -> Callable[..., Any]:
        """A function that does the same and keeps the time and the tokens."""

        def run(*args: Any) -> Any:
            found: list[Any] = []
            self.rollouts.add(lambda: found.append(draw(*args)))
            self.tokens.append(tokens_of(found[0]))
            return found[0]

        return run

    @property
    def by_token(self) -> tuple[float, float]:
        """CPU and wall seconds of a step for each token drawn."""
        return sum(self.steps.cpu) / sum(self.tokens), sum(self.steps.wall) / sum(self.tokens)

    def end(self) -> None:
        """A step is over."""
        now = time.process_time(), time.perf_counter()
        if self.last is None:
            for values in (self.rollouts.cpu, self.rollouts.wall, self.tokens):
                values.pop()
        else:
            self.steps.cpu.append(now[0] - self.last[0])
            self.steps.wall.append(now[1] - self.last[1])
        self.last = now


def our_method(folder: str) -> Any:
    """GRPO with TRL's conventions."""
    import torch

    from lit_rl.methods.grpo import GRPO
    from lit_rl.modules.config import LossConfig, RolloutConfig

    settings: dict[str, Any] = {
        "rollout": RolloutConfig(samples=SAMPLES, max_tokens=LONGEST),
        "loss": LossConfig(reduction="token_mean"),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=0.0),
    }
    return GRPO(folder, epsilon=EPSILON, reward_workers=0, **settings)


def our_fit(folder: str, prompts: Sequence[str], batch: int, record: Record) -> Callable[[], None]:
    """A function that fits over all prompts once."""
    from lightning.pytorch import Callback, Trainer
    from torch.utils.data import DataLoader

    from lit_rl.problems import Problem
    from lit_rl.rewards.tasks import TASKS, Task

    class Ends(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            record.end()

    TASKS[TASK] = Task(lambda row: str(row["prompt"]), lambda row, response: parity(response), lambda row, text: text)
    method: Any = our_method(folder)
    method.configure_model()
    method._draw = record.timed(method._draw, lambda drawn: int(drawn.mask.sum()))
    problems: Any = [Problem(number, TASK, prompt) for number, prompt in enumerate(prompts)]

    def fit() -> None:
        record.last = None
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[Ends()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(method, DataLoader(problems, batch, collate_fn=method.prompt_collator()))

    return fit


def their_trainer(folder: str, prompts: Sequence[str], batch: int, tuned: bool = False) -> Any:
    """TRL's trainer over all prompts once."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    def reward(completions: list[str], **rest: Any) -> Any:
        return [parity(text) for text in completions]

    rows = MICRO_BATCH if tuned else batch * SAMPLES
    config = GRPOConfig(
        folder, per_device_train_batch_size=rows, gradient_accumulation_steps=batch * SAMPLES // rows,
        num_generations=SAMPLES, max_completion_length=LONGEST, learning_rate=LEARNING_RATE, num_train_epochs=1,
        lr_scheduler_type="constant", loss_type="dapo", beta=0.0, shuffle_dataset=False, use_cpu=True, bf16=False,
        gradient_checkpointing=False, cache_implementation="static" if tuned else None, report_to=[],
        logging_strategy="no", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        use_bias_correction_kl=False,  # its default weights k3 by the ratio, for which we have no name
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        reward,
        config,
        Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def their_fit(trainer: Any, record: Record) -> Callable[[], None]:
    """A function that trains over all prompts once."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, *args: Any, **rest: Any) -> None:
            record.end()

    trainer.add_callback(Ends())
    trainer._generate_and_score_completions = record.timed(
        trainer._generate_and_score_completions, lambda drawn: int(drawn["num_items_in_batch"])
    )

    def fit() -> None:
        record.last = None
        trainer.train()

    return fit


def fixed_batch(method: Any, pad: int) -> tuple[Any, dict[str, Any]]:
    """The same responses, old and reference log-probs and advantages, as we and as TRL want them."""
    import torch

    from lit_rl.modules.experience import Experience

    sequences = sequences_of(4, *PROMPT_TOKENS, 4000)
    lengths = torch.tensor([len(response) for response in sequences.responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    responses = torch.full(mask.shape, pad)
    responses[mask] = torch.tensor([token for response in sequences.responses for token in response])
    torch.manual_seed(0)
    with torch.no_grad():
        now = method.passes.log_probs(sequences, responses, mask)
    old, reference = (torch.where(mask, now + 0.3 * torch.randn(mask.shape), 0.0) for _ in range(2))
    advantages = torch.randn(len(mask))
    ours = Experience(sequences, responses, mask, old, advantages[:, None] * mask, reference_log_probs=reference)
    width = max(map(len, sequences.prompts))
    before = [width - len(prompt) for prompt in sequences.prompts]
    theirs = {
        "prompt_ids": torch.tensor([[pad] * n + list(p) for n, p in zip(before, sequences.prompts, strict=True)]),
        "prompt_mask": (torch.arange(width) >= torch.tensor(before)[:, None]).long(),
        "completion_ids": responses,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
    }
    return ours, theirs


def compare_losses(folder: str, prompt: str) -> list[dict[str, Any]]:
    """Loss and gradient of a fixed batch, one row a loss type and clip range."""
    from lit_rl.modules.config import LossConfig
    from lit_rl.modules.surrogate import Surrogate

    method = attached(our_method(folder))
    trainer = their_trainer(folder, [prompt] * 4, 4)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    ours, theirs = fixed_batch(method, trainer.processing_class.pad_token_id)
    rows = []
    for kind, reduction in REDUCTIONS.items():
        for low, high, weight in CLIPPING:
            config: dict[str, Any] = {"clip_low": low, "clip_high": high, "reduction": reduction, "kl_coef": weight}
            method.loss, method.kl_coef = LossConfig(**config), weight
            method.surrogate = Surrogate(method.loss, method.term)
            given = replace(ours, reference_log_probs=ours.reference_log_probs if weight else None)
            loss, _ = gradients_of(method, given, "auto", 2048)
            vars(trainer).update(loss_type=kind, epsilon_low=low, epsilon_high=high, beta=weight)
            trainer.model.zero_grad()
            (expected := trainer._compute_loss(trainer.model, theirs)).backward()
            gradient, wanted = flat_gradient(method.policy.model), flat_gradient(trainer.model)
            value, apart = float(expected.detach()), float((gradient - wanted).norm() / wanted.norm())
            rows.append(
                {
                    "TRL's loss": kind,
                    "our reduction": reduction,
                    "clip": f"{low}/{high}",
                    "k3": weight,
                    "loss": value,
                    "loss differs": abs(loss - value) / abs(value),
                    "gradient differs": apart,
                    "equal": max(abs(loss - value) / abs(value), apart) < TOLERANCE,
                }
            )
    return rows


def compare_steps(
    name: str, batch: int, folder: str, words: list[str], steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of the table for one model and number of prompts."""
    draw = random.Random(0)
    prompts = texts(words, [draw.randint(*PROMPT_TOKENS) for _ in range(batch * steps)], 0)
    records = {side: Record() for side in ("ours", "TRL", "TRL, tuned")}
    fits = {"ours": our_fit(folder, prompts, batch, records["ours"])}
    for side in ("TRL", "TRL, tuned"):
        trainer = their_trainer(folder, prompts, batch, tuned=side != "TRL")
        fits[side] = their_fit(trainer, records[side])
    for _ in range(rounds):
        for fit in fits.values():
            fit()

    rows = []
    for side, record in records.items():
        count = len(record.tokens)
        total, drawing = sum(record.steps.wall), sum(record.rollouts.wall)
        cpu, wall = (theirs / ours for theirs, ours in zip(record.by_token, records["ours"].by_token, strict=True))
        rows.append(
            {
                "model": name,
                "prompts": batch,
                "side": side,
                "steps": count,
                "tokens a step": sum(record.tokens) // count,
                "cpu s": sum(record.steps.cpu) / count,
                "wall s": total / count,
                "rollout s": drawing / count,
                "update s": (total - drawing) / count,
                "tokens/s": round(sum(record.tokens) / total),
                "ours faster (cpu)": cpu,
                "(wall)": wall,
                "noise": record.steps.noise,
                "target": "" if side == "ours" else TARGET,
                "reached": side == "ours" or wall >= TARGET,
            }
        )
    return rows


def main() -> int:
    """Compare losses, then steps; 1 where losses or gradients differ."""
    settings = arguments(__doc__)
    announce(
        "GRPO step",
        ("torch", "transformers", "trl", "lightning"),
        settings.threads,
        f"{SAMPLES} responses a prompt, up to {LONGEST} tokens; means over steps; 'faster' by token drawn",
    )
    warnings.simplefilter("ignore")  # of three libraries about each other
    equal = True
    for number, (name, batches) in enumerate(list(CASES.items())[: 1 if settings.quick else None]):
        with tempfile.TemporaryDirectory() as folder:
            words = words_of_one_token(save_model(name, folder))
            if number == 0:
                rows = compare_losses(folder, words[0])
                print_table(rows)
                equal = all(row["equal"] for row in rows)
            steps, rounds = (3, 2) if settings.quick else (4, 4)
            for batch in batches[:1] if settings.quick else batches:
                print()
                print_table(compare_steps(name, batch, folder, words, steps, rounds))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
