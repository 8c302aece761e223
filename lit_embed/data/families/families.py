"""Puts the families together."""

from functools import lru_cache

from lit_embed.data.families.config import Families, FamiliesConfig, TrainTask
from lit_embed.data.families.domains import DOMAINS, Domain, Split
from lit_embed.data.families.evaluation import DomainTasks
from lit_embed.data.families.texts import Texts
from lit_embed.data.families.training import base_task, train_task
from lit_embed.retrieval.tasks import EvalTask, TaskType

# type and share of the largest set's rows; the domains that are trained on take turns
PLAN: tuple[tuple[TaskType, float], ...] = (
    ("retrieval", 1.0),
    ("retrieval", 0.625),
    ("reranking", 0.45),
    ("classification", 0.375),
    ("sts", 0.3),
    ("clustering", 0.25),
    ("pair_classification", 0.2),
    ("retrieval", 0.15),
)
TYPES: tuple[TaskType, ...] = tuple(dict.fromkeys(kind for kind, _ in PLAN))


@lru_cache(maxsize=2)
def build_families(config: FamiliesConfig | None = None) -> Families:
    """Build all sets and tasks of a configuration; the last two are kept, so treat the result as read-only.

    The evaluation tasks depend on ``seed``, ``held_out``, ``overlap``, ``values`` and ``test_queries`` alone.

    Raises:
        InputError: There are not as many different texts as wanted.
    """
    config = config or FamiliesConfig()
    meanings = {name: domain.meanings(config.seed, config.values) for name, domain in DOMAINS.items()}
    planned = plan(config)
    texts = Texts()  # evaluation first, so that training's sizes leave it as it is
    evaluation: dict[Split, list[EvalTask]] = {"test": [], "val": []}
    for split, tasks in evaluation.items():
        for name, domain in DOMAINS.items():
            kinds = TYPES if name in config.held_out else [kind for kind, of, _ in planned if of == domain]
            written = DomainTasks(config, domain, split, meanings[name][split], texts)
            tasks += map(written.task, kinds)
    base = [base_task(config, domain, meanings[name]["train"], texts) for name, domain in DOMAINS.items()]
    train: list[TrainTask] = [
        train_task(config, kind, domain, meanings[domain.name]["train"], rows, texts) for kind, domain, rows in planned
    ]
    return Families(config, train, base, evaluation["val"], evaluation["test"])


def plan(config: FamiliesConfig) -> list[tuple[TaskType, Domain, int]]:
    """Type, domain and rows of each training set, the largest first."""
    trained = [domain for name, domain in DOMAINS.items() if name not in config.held_out]
    planned: list[tuple[TaskType, Domain, int]] = []
    for number, (kind, share) in enumerate(PLAN):
        turn = number % len(trained)
        free = [d for d in trained[turn:] + trained[:turn] if (kind, d) not in [taken[:2] for taken in planned]]
        planned.append((kind, free[0], round(share * config.rows)))
    return planned
