import json
import math
from pathlib import Path
from typing import Any

import policy_worker as worker
import pytest
import torch
from policy_worker import FLAT, Logged, SaveAt, adam, weights
from torch import Tensor

from lit_core.backbones import Lora
from lit_rl.data.prompts import PromptDataModule
from lit_rl.methods.sft import SFT
from lit_rl.modules.config import EvaluationConfig
from lit_rl.problems import Problem

PROBLEMS = [
    Problem(0, "countdown_bare", "1 2 3=6:", solution="1+2+3"),
    Problem(1, "countdown_bare", "4 4=8:", solution="4+4"),
    Problem(2, "countdown_bare", "7 1 1 1 1 1=12:", solution="7+1+1+1+1+1"),
    Problem(3, "countdown_bare", "5=5:", solution=""),  # the end token alone
]


def sft(**settings: Any) -> SFT:
    return SFT(**{"backbone": "nano-qwen3", "max_tokens": 8, "optimizer": adam, "schedule": FLAT,
                  "evaluation": EvaluationConfig(samples=2), "reward_workers": 0, **settings})  # fmt: skip


def plain_loss(model: Any, batch: Any) -> Tensor:
    """Loss of transformers on a padded batch whose prompts carry no labels."""
    texts = [[*prompt, *solution] for prompt, solution in zip(batch.prompts, batch.solutions, strict=True)]
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    labels = torch.full_like(ids, -100)
    for row, (prompt, solution) in enumerate(zip(batch.prompts, batch.solutions, strict=True)):
        labels[row, len(prompt) : len(prompt) + len(solution)] = torch.tensor(solution)
    return model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss


@pytest.mark.parametrize("micro_tokens", [None, 1, 30])
@pytest.mark.parametrize(
    "settings", [{}, {"backbone": "tiny-llama"}, {"lora": Lora(r=4)}], ids=["full", "llama", "lora"]
)
def test_the_loss_and_its_gradient_are_those_of_transformers(micro_tokens: int | None, settings: Any) -> None:
    module = sft(micro_tokens=micro_tokens, **settings)
    module.configure_model()
    batch = module.demonstration_collator()(PROBLEMS)
    assert module.batch_tokens(batch) == sum(map(len, batch.prompts)) + sum(map(len, batch.solutions))
    assert batch.solutions[3] == [module.policy.tokenizer.eos_token_id]
    model: Any = module.policy.model
    expected = plain_loss(model, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)
    found = module(batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    gradients = torch.autograd.grad(found, trained, allow_unused=True)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def demonstrations(folder: Path) -> PromptDataModule:
    path = folder / "sums.jsonl"
    rows = [{"numbers": [a, b], "target": a + b, "solution": f"{a}+{b}"} for a in range(1, 9) for b in range(1, 9)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return PromptDataModule(str(path), "countdown_bare", batch_size=16, eval_batch_size=32)


def fit(module: SFT, folder: Path, steps: int, *callbacks: Any, ckpt: Path | None = None, **settings: Any) -> Any:
    run = worker.trainer(folder, steps, *callbacks, **settings)
    run.fit(module, datamodule=demonstrations(folder), ckpt_path=ckpt, weights_only=True)
    return run


@pytest.mark.slow
def test_a_warm_start_solves_what_it_has_seen_and_more(tmp_path: Path) -> None:
    module, logged = sft(), Logged()
    run = fit(
        module, tmp_path, 160, logged, limit_val_batches=1.0, val_check_interval=160, check_val_every_n_epoch=None
    )
    assert logged.rows[0]["train/loss"] == pytest.approx(math.log(1024), abs=0.1)
    assert logged.rows[-1]["train/loss"] < 0.5
    assert float(run.callback_metrics["val/invalid"]) < 0.5
    assert {"val/success", "val/pass@2", "val/entropy"} <= run.callback_metrics.keys()


@pytest.mark.slow
def test_a_fit_resumed_in_mid_epoch_ends_bit_for_bit_alike(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    whole, resumed = sft(), sft()
    fit(whole, tmp_path, 7, SaveAt(path, 2))  # an epoch has 3 batches
    torch.manual_seed(99)
    fit(resumed, tmp_path, 7, ckpt=path)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    halted = torch.load(path, weights_only=True)["state_dict"]
    assert any(not torch.equal(halted[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_an_export_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = sft(lora=Lora(r=4))
    fit(module, tmp_path, 3)
    module.export(tmp_path / "export")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    batch = module.demonstration_collator()(PROBLEMS)
    torch.testing.assert_close(
        plain_loss(model, batch), plain_loss(module.policy.model.eval(), batch), atol=1e-5, rtol=0
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer("1+2")["input_ids"] == module.policy.tokenizer("1+2")["input_ids"]
