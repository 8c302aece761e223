"""Fits for `test_fits.py` (one process) and `test_distributed.py` (two against one)."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from two_ranks import become_two_ranks

from experiments.dense import SPEC
from lit_core.backbones import Lora
from lit_core.callbacks.step_seed import StepSeed
from lit_core.module import Method
from lit_core.optim import Schedule
from lit_core.sharding import average_gradients, gather_rows, rank
from lit_core.stages import write_export
from lit_embed.data.bagging import Bag
from lit_embed.data.datamodule import RetrievalDataModule
from lit_embed.data.families import FamiliesConfig
from lit_embed.data.task_datamodule import TaskDataModule
from lit_embed.data.text_datamodule import TextDataModule
from lit_embed.data.world import WorldConfig
from lit_embed.functional.losses import info_nce
from lit_embed.methods.boom import Boom
from lit_embed.methods.causal_lm import CausalLM
from lit_embed.methods.dense import Dense
from lit_embed.methods.llm_ql import LLMQL
from lit_embed.modules.batches import PairCollator, document_key
from lit_embed.modules.tokenization import EncoderConfig

WORLD = WorldConfig(documents=100, train_questions=40, dev_questions=9, test_questions=8, texts=40)
FAMILIES = FamiliesConfig(rows=800, base_rows=20, test_queries=10)
SHORT = EncoderConfig(query_length=24, passage_length=48, chunk_tokens=256)
FINE = EncoderConfig(query_length=24, passage_length=48, chunk_tokens=40)  # chunks of a text or two: ranks differ
LORA = Lora(r=4, dropout=0.0)
FLAT = Schedule("constant")


def sgd(params: Any) -> torch.optim.Optimizer:
    """Its steps are linear in the gradient, so that rounding is not blown up as by Adam's first steps."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def _build(method: type[Method], settings: dict[str, Any], **defaults: Any) -> Method:
    common = {"backbone": "tiny-qwen3", "optimizer": sgd, "schedule": FLAT, "max_grad_norm": 0.5}
    return method(**{**common, **defaults, **settings})


def dense(**settings: Any) -> Method:
    return _build(Dense, settings, encoder=SHORT, temperature=0.1)


def likelihood(**settings: Any) -> Method:
    return _build(LLMQL, settings, encoder=SHORT, stage="query_likelihood")


def boom(**settings: Any) -> Method:
    return _build(Boom, settings, encoder=SHORT, temperature=0.1)


def language_model(**settings: Any) -> Method:
    return _build(CausalLM, settings)


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def data(module: Method, batch_size: int = 8) -> LightningDataModule:
    """The same global batches on any number of processes."""
    if isinstance(module, CausalLM):
        return TextDataModule(batch_size=batch_size // processes(), world=WORLD)
    if isinstance(module, Boom):
        return TaskDataModule(families=FAMILIES, bag=Bag(10), batch_size=batch_size // processes(), negatives=2)
    return RetrievalDataModule(batch_size=batch_size // processes(), world=WORLD, val_pairs=8)


def trainer(folder: Path, strategy: str, steps: int, *callbacks: Callback, **settings: Any) -> Trainer:
    kind: Any = "auto"
    if processes() > 1:
        kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp" else strategy
    return Trainer(
        accelerator="cpu",
        devices=processes(),
        strategy=kind,
        max_steps=steps,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[StepSeed(0), *callbacks],
        **settings,
    )


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Trained weights, whole on every rank."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            whole = getattr(parameter, "full_tensor", None)
            found[name] = (parameter if whole is None else whole()).detach().clone()
    return found


class SaveAt(Callback):
    """Writes a checkpoint after a step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(
    module: Method, folder: Path, strategy: str = "auto", steps: int = 2, *callbacks: Callback, ckpt: Path | None = None
) -> dict[str, Any]:
    """Fit and return the weights and what was logged."""
    run = trainer(folder, strategy, steps, *callbacks, limit_val_batches=0)
    run.fit(module, datamodule=data(module), ckpt_path=ckpt, weights_only=True)
    return {"weights": weights(module), "grad_norm": run.callback_metrics["train/grad_norm"]}


def validate(module: Method, folder: Path, strategy: str) -> dict[str, Any]:
    """Metrics of an untrained model."""
    run = trainer(folder, strategy, 1)
    run.validate(module, datamodule=data(module), verbose=False)
    return {"metrics": {name: value.detach() for name, value in run.callback_metrics.items()}}


def rank_tests(module: Method, folder: Path, strategy: str) -> dict[str, Any]:
    """Runs of the test queries."""
    run = trainer(folder, strategy, 1)
    run.test(module, datamodule=data(module), verbose=False)
    return {"runs": module.runs}


def items(numbers: range) -> list[dict[str, Any]]:
    """Pairs in which documents and their positives repeat across ranks, one query group being closed."""
    drawn = [("a", "x"), ("b", "a"), ("a", "b"), ("c", "x"), ("d", "e")]  # x is drawn on both ranks
    return [
        {"query": str(at), "query_id": str(at), "passages": list(drawn[at]), "passage_ids": list(drawn[at]),
         "positive_ids": [drawn[at][0], *(["d"] if at == 1 else [])], "own_group_only": at == 3, "dataset": "set",
         "seed": 0, "scores": None if at == 4 else [1.0, 0.4 * at]}
        for at in numbers
    ]  # fmt: skip


class _Letters:
    """Stands in for a tokenizer where only ids matter."""

    def __call__(self, texts: list[str], kind: str) -> Any:
        from lit_core.tokens import Tokens

        return Tokens.from_lists(
            [[document_key(text) % 97 if kind == "passage" else 100 + int(text)] for text in texts]
        )


def gathered(split: int, build: Callable[..., Method] = dense, **settings: Any) -> dict[str, Any]:
    """Loss and averaged gradient of a linear encoder; rank 0 holds the first ``split`` queries, rank 1 the others."""
    numbers = range(5) if processes() == 1 else (range(split), range(split, 5))[rank()]
    batch = PairCollator(_Letters())(items(numbers))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(110, 6, generator=generator)
    weight = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
    vectors = features[batch.tokens.ids] @ weight
    module: Any = build(**settings)
    loss = module.loss(vectors, batch)
    loss.backward()
    average_gradients([weight])
    mean = sum(gather_rows(loss.detach()[None]).tolist()) / processes()
    return {"loss": mean, "gradient": weight.grad}


def gathered_without_gradient() -> dict[str, Any]:
    """The form that is not exact: passages of other ranks are constants."""
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(2, 8, 6, generator=generator), torch.nn.Parameter(torch.eye(6)[:, :4])
    rows = slice(None) if processes() == 1 else slice(4 * rank(), 4 * rank() + 4)
    queries, passages = features[0, rows] @ weight, features[1, rows] @ weight
    gradients = []
    for everyone in (gather_rows(passages), gather_rows(passages.detach())):
        if not everyone.requires_grad:  # own rows keep their gradient, as in the usual wrong form
            everyone = everyone.clone()
            everyone[rows] = passages
        targets = torch.arange(8)[rows]
        weight.grad = None
        info_nce(queries, everyone, 0.5, targets).backward(retain_graph=True)
        average_gradients([weight])
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
    return {"exact": gradients[0], "constant": gradients[1]}


def resumed(module: Callable[[], Method], folder: Path, strategy: str) -> dict[str, Any]:
    """A fit of four steps, and its last two again from the checkpoint after the second; the first one's export."""
    path = folder / "half.ckpt"
    whole = fit(module(), folder, strategy, 4, SaveAt(path, 2))
    again = fit(module(), folder, strategy, 4, ckpt=path)
    return {"weights": whole["weights"], "resumed": again["weights"], "grad_norm": whole["grad_norm"]}


def exported(folder: Path, strategy: str) -> dict[str, Any]:
    """A fit of two steps, exported from its checkpoint."""
    path = folder / "export.ckpt"
    fit(dense(), folder, strategy, 2, SaveAt(path, 2))
    if rank() == 0:
        write_export(SPEC, path, folder / "export", "merged")
    return {"sharded": path.is_dir()}


def scenarios(folder: Path, untied: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything that two processes must do as one does."""
    fits: dict[str, tuple[str, Callable[[], Method]]] = {
        "ddp": ("ddp", dense),
        "ddp cached": ("ddp", lambda: dense(grad_cache=True, encoder=FINE)),
        "ddp bert": ("ddp", lambda: dense(backbone="tiny-bert-still")),
        "ddp bert adapters": ("ddp", lambda: dense(backbone="tiny-bert-still", lora=LORA)),
        "ddp likelihood": ("ddp", likelihood),
        "ddp likelihood both": ("ddp", lambda: likelihood(loss_scope="document_and_query", lora=LORA)),
        "ddp language model": ("ddp", language_model),
        "ddp boom": ("ddp", boom),
        "ddp boom cached": ("ddp", lambda: boom(grad_cache=True, encoder=FINE)),
        "fsdp": ("fsdp", dense),
        "fsdp uneven chunks": ("fsdp", lambda: dense(encoder=FINE)),
        "fsdp cached": ("fsdp", lambda: dense(grad_cache=True, encoder=FINE)),
        "fsdp tied likelihood": ("fsdp", lambda: likelihood(encoder=FINE)),
        "fsdp untied likelihood": ("fsdp", lambda: likelihood(backbone=untied, encoder=FINE)),
        "fsdp likelihood adapters": ("fsdp", lambda: likelihood(lora=LORA)),
        "fsdp language model": ("fsdp", lambda: language_model(backbone=untied)),
    }
    still = str(Path(untied).with_name("still"))

    def run(strategy: str, build: Callable[[], Method]) -> dict[str, Any]:
        module: Any = build()
        module.backbone = still if module.backbone == "tiny-bert-still" else module.backbone
        return fit(module, folder, strategy)

    found: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda strategy=strategy, build=build: run(strategy, build) for name, (strategy, build) in fits.items()
    }
    for split in (2, 3, 4):
        found[f"gathered {split}"] = lambda split=split: gathered(split)
        found[f"gathered distilled {split}"] = lambda split=split: gathered(split, boom, distillation=True)
        found[f"gathered symmetric {split}"] = lambda split=split: gathered(split, symmetric=True, matryoshka=[2])
    found |= {
        "gathered without gradient": gathered_without_gradient,
        "ddp validation": lambda: validate(dense(), folder, "ddp"),
        "ddp boom validation": lambda: validate(boom(), folder, "ddp"),
        "fsdp validation": lambda: validate(dense(encoder=FINE), folder, "fsdp"),
        "ddp ranking": lambda: rank_tests(likelihood(rerank_top_k=5), folder, "ddp"),
        "fsdp ranking": lambda: rank_tests(likelihood(rerank_top_k=5, encoder=FINE), folder, "fsdp"),
        "fsdp resumed": lambda: resumed(dense, folder, "fsdp"),
        "fsdp adapters resumed": lambda: resumed(lambda: dense(lora=LORA, grad_cache=True), folder, "fsdp"),
        "fsdp export": lambda: exported(folder, "fsdp"),
    }
    return found


def main(folder: str, untied: str, *names: str) -> None:
    """Run scenarios on this rank; the first one writes what came out."""
    warnings.filterwarnings("ignore")  # advice of torch and lightning on tiny runs; the one-process runs have errors
    torch.set_num_threads(1)
    out = Path(folder)
    known = scenarios(out, untied)
    trainer(out, "ddp", 1).strategy.setup_environment()  # the process group that all runs share
    for name in names or known:
        found = known[name]()
        if rank() == 0:
            torch.save(found, out / f"{name}.pt")
            print("done", name, flush=True)


if __name__ == "__main__":
    become_two_ranks(main, *sys.argv[1:])
