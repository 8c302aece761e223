"""Which training sets help one another: short runs on each and on each pair, and the clusters that follow."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from experiments.boom.training import drawn, names_flag, order_seed, sets_of, start_flags, total
from lit_core.files import read_json, write_json
from lit_core.reproduce import Arm, ArmContext, write_results
from lit_core.setting import Setting
from lit_core.stages import ExperimentCLI
from lit_embed.data.gains import clusters, gain_matrix

GAINS, CLUSTERS = "gains.json", "clusters.json"
HELD_OUT = 20  # percent of the rows of each set, on which losses are compared
COUNT = 3  # clusters
LOSS_BATCHES = 8  # of each set, at most
# rows of each set in these runs, which cost as many runs as there are pairs
ROWS = {"smoke": 40, "tiny": 480, "paper": 20_000}


def gains_arm(setting: Setting, needs: tuple[str, ...]) -> Arm:
    """Losses on held-out rows after training on one set and on two, with as many steps for each set (card 2.5)."""

    def run(context: ArmContext) -> None:
        names = list(sets_of(setting, context))
        alone = {name: _losses(setting, context, [name])[name] for name in names}
        pairs = [(first, second) for row, first in enumerate(names) for second in names[row + 1 :]]
        joint = {}
        for first, second in pairs:
            found = _losses(setting, context, [first, second])
            joint[first, second] = found[first], found[second]
        gains = gain_matrix(alone, joint)
        write_json(context.folder / GAINS, {"names": names, "gains": [[None if a == b else float(gains[a, b])
                   for b in range(len(names))] for a in range(len(names))]})  # fmt: skip
        chosen = clusters(names, gains, min(COUNT, len(names)))
        write_json(context.folder / CLUSTERS, {f"cluster{number}": sets for number, sets in enumerate(chosen, start=1)})
        write_json(context.folder / "curves.json", {})
        costs = [read_json(path)["cost"] for path in sorted(context.folder.rglob("losses.json"))]
        share = sum(cost["rows"] for cost in costs) / sum(of["rows"] for of in sets_of(setting, context).values())
        write_results(context.folder, {"clusters": float(len(chosen)), "cost": share}, cost=total(costs))

    return Arm("gains", "pairs of sets", run, main=False, seeded=False, hidden=True, needs=needs)


def _losses(setting: Setting, context: ArmContext, names: Sequence[str]) -> dict[str, float]:
    """Held-out loss of each of the sets after training on all of them; kept, so that a kill loses one run."""
    folder = context.folder / "+".join(names)
    path = folder / "losses.json"
    if not path.exists():
        limit = min(ROWS[setting.scale], setting.value(None, "data.limit") or ROWS[setting.scale])
        ratio, rows = f"--data.bag.ratio={HELD_OUT}", f"--data.limit={limit}"
        sets = names_flag("train_on", names)
        start = start_flags(context, "base")
        cli: Any = setting.fit(
            folder / "fit", order_seed(context, 0), [*start, sets, rows, ratio, "--data.bag.complement=true"]
        )
        losses = {name: _held_out_loss(setting, folder, cli.model, name, [rows, ratio]) for name in names}
        cost = {"steps": float(cli.trainer.global_step), "tokens": float(cli.throughput.tokens), "rows": drawn(cli)}
        write_json(path, {"losses": losses, "cost": cost})
    return read_json(path)["losses"]


@torch.no_grad()
def _held_out_loss(setting: Setting, folder: Path, module: Any, name: str, flags: Sequence[str]) -> float:
    """Mean loss of a set's rows that were kept out of training, in batches like those of training."""
    args = ["fit", *setting.flags, *flags, names_flag("train_on", [name]), "--seed_everything=0"]
    cli = ExperimentCLI(setting.spec, args, setting.spec.configs(setting.scale), folder, quiet=True, execute=False)
    data: Any = cli.datamodule
    data.setup("fit")
    data.trainer = module.trainer  # whose module makes the batches
    module.eval()
    losses = [float(module.pair_loss(batch)) for batch in islice(data.train_dataloader(), LOSS_BATCHES)]
    return sum(losses) / len(losses)
