"""What the evaluation of a reward model leaves behind: rewards of every pair, results, and a table."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_core.files import write_json, write_jsonl
from lit_core.intervals import bootstrap_mean
from lit_core.results import write_results
from lit_rl.rewards.pairwise import Rewards, dialogue_length, outcomes, score_pairs


class PreferenceReport(Callback):
    """Files and table of an evaluation.

    After ``test``: ``rewards.jsonl``, ``results.json`` and the table, beside preferring the longer reply. After
    ``validate``: ``validation.json`` with the logged metrics. After ``predict``: ``rewards.jsonl``; every rank writes
    its own part, named ``rewards.<rank>`` where there are several.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.predicted: Rewards = {}

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            write_json(self.folder / "validation.json", values)
            print(f"accuracy on the validation pairs: {values['val/accuracy']:.4f}", flush=True)

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rewards: Rewards = vars(pl_module)["rewards"]
        self._write("rewards", rewards)
        pairs = [
            pair for pair in vars(trainer)["datamodule"].test_pairs if pair["id"] in rewards
        ]  # trials leave some out
        lengths = score_pairs(pairs, dialogue_length)
        rows = {"reward model": outcomes(rewards), "longer reply": outcomes(lengths)}
        means = {name: sum(row.values()) / len(row) for name, row in rows.items()}
        logged = {name.partition("/")[2]: float(value) for name, value in trainer.callback_metrics.items()}
        metrics = {"accuracy": means["reward model"], "longer_reply/accuracy": means["longer reply"]}
        metrics |= {name: logged[name] for name in ("loss", "reward_margin")}
        write_results(self.folder, metrics, {"accuracy": rows["reward model"]})
        _print_table(rows)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        both = zip(outputs["chosen"].tolist(), outputs["rejected"].tolist(), strict=True)
        self.predicted.update(zip(outputs["ids"], both, strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(f"rewards.{trainer.global_rank}" if trainer.world_size > 1 else "rewards", self.predicted)

    def _write(self, name: str, rewards: Rewards) -> None:
        rows = ({"id": pair_id, "chosen": both[0], "rejected": both[1]} for pair_id, both in sorted(rewards.items()))
        write_jsonl(self.folder / f"{name}.jsonl", rows)


def _print_table(rows: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    count = len(next(iter(rows.values())))
    table = Table("", "accuracy", "95 % interval over pairs", title=f"{count} test pairs", title_justify="left")
    for name, row in rows.items():
        found = bootstrap_mean([row])
        table.add_row(name, f"{found.mean:.4f}", f"{found.low:.4f} to {found.high:.4f}")
    Console().print(table)
