"""The loss of a member with a teacher, and scores of tasks; fits are in test_fits.py."""

import math
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch

from lit_core.errors import InputError
from lit_core.files import read_json
from lit_core.presets import preset_tokenizer
from lit_embed.callbacks.tasks import TaskReport
from lit_embed.data.task_datamodule import TaskDataModule
from lit_embed.data.task_sources import instruct
from lit_embed.methods.boom import Boom, score_tasks
from lit_embed.methods.dense import Dense
from lit_embed.modules.batches import PairBatch, PairCollator
from lit_embed.modules.encoder import build_encoder
from lit_embed.modules.tokenization import EncoderConfig, TextTokenizer
from lit_embed.retrieval.tasks import Sts, mean_scores

ITEMS = [  # query, drawn passages (positive first), own group only, a teacher's scores
    ("q1", "abc", False, [1.0, 0.5, -1.0]),
    ("q2", "cdd", False, [0.2, 0.1, 0.1]),  # d was drawn twice: counts once
    ("q3", "efa", True, None),  # no scores: the positive alone is right
    ("q4", "gb", False, [3.0, 2.0]),
]


def _batch(scored: bool = True) -> PairBatch:
    items = [
        {"query": query, "query_id": query, "passages": list(ids), "passage_ids": list(ids),
         "positive_ids": [ids[0]], "own_group_only": own, "dataset": "set", "seed": 0, "scores": scores}
        for query, ids, own, scores in ITEMS
    ]  # fmt: skip
    items = items if scored else [{**item, "scores": None} for item in items]
    return PairCollator(TextTokenizer(preset_tokenizer("tiny-qwen3"), EncoderConfig("eos")))(items)


def test_the_loss_with_a_teacher_is_that_of_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4 + 7, 8, generator=generator, dtype=torch.float64)
    names, rows = "abcdefg", torch.nn.functional.normalize(vectors, dim=1)
    expected = []
    for number, (_, ids, own, scores) in enumerate(ITEMS):
        cosine = {name: float(rows[number] @ rows[4 + names.index(name)]) / 0.3 for name in names}
        group = list(dict.fromkeys(ids))
        weights = [1.0] if scores is None else [math.exp(scores[ids.index(name)]) for name in group]
        left, loss = set(group if own else names), 0.0
        for name, weight in zip(group, weights, strict=False):
            loss += weight / sum(weights) * (math.log(sum(math.exp(cosine[c]) for c in left)) - cosine[name])
            left.remove(name)
        expected.append(loss)
    module = Boom("tiny-qwen3", temperature=0.3, distillation=True)
    assert float(module.loss(vectors, _batch())) == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_without_a_teacher_the_loss_is_that_of_dense_retrieval() -> None:
    vectors = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    plain = Dense("tiny-qwen3", temperature=0.02).contrastive_loss(vectors, _batch())
    torch.testing.assert_close(Boom("tiny-qwen3").loss(vectors, _batch()), plain)
    torch.testing.assert_close(Boom("tiny-qwen3", distillation=True).loss(vectors, _batch(scored=False)), plain)
    assert not torch.isclose(Boom("tiny-qwen3", distillation=True).loss(vectors, _batch()), plain)


def test_worked_example_of_the_card() -> None:
    """B = 2, g = 2, T = .02: cosines [[.8, .6, .1, 0], [.2, .3, .7, .65]] give .0394676, with own groups too."""
    cosines = torch.tensor([[0.80, 0.60, 0.10, 0.00], [0.20, 0.30, 0.70, 0.65]], dtype=torch.float64)
    rest = (1 - cosines.square().sum(0)).sqrt()
    passages = torch.cat([cosines, torch.diag(rest)])  # unit columns with these cosines to the first two axes
    vectors = torch.cat([torch.eye(6, dtype=torch.float64)[:2], passages.T])
    for own in (False, True):
        items = [
            {"query": name, "query_id": name, "passages": list(ids), "passage_ids": list(ids), "seed": 0,
             "positive_ids": [ids[0]], "own_group_only": own, "dataset": "set", "scores": None}
            for name, ids in (("q1", "ab"), ("q2", "cd"))
        ]  # fmt: skip
        batch = PairCollator(TextTokenizer(preset_tokenizer("tiny-qwen3"), EncoderConfig("eos")))(items)
        assert float(Boom("tiny-qwen3").loss(vectors, batch)) == pytest.approx(0.0394676, abs=2e-6)


def test_defaults_are_the_papers() -> None:
    module = Boom("tiny-qwen3")
    assert module.loss.temperature == 0.02
    assert (module.encoder_config.query_length, module.encoder_config.passage_length) == (512, 512)
    assert module.encoder_config.pooling == "last"
    assert (module.schedule.name, module.schedule.warmup_ratio) == ("linear", 0.1)
    assert module.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 5e-5


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_bad_temperatures_are_errors(value: float) -> None:
    with pytest.raises(InputError, match="temperature must be above 0"):
        Boom("tiny-qwen3", temperature=value)


def test_tasks_that_were_not_encoded_whole_are_left_out_with_a_warning() -> None:
    texts = {"a": "x", "b": "y"}
    tasks = [
        Sts(name=name, domain="in", queries=texts, pairs=[("a", "b", 1.0), ("a", "a", 2.0)]) for name in ("s", "t")
    ]
    evaluation: Any = [(task, {text: f"{task.name}/{text}" for text in texts}, {}) for task in tasks]
    vectors = {"s/a": torch.tensor([1.0, 0.0]), "s/b": torch.tensor([0.0, 1.0]), "t/a": torch.tensor([1.0, 0.0])}
    with pytest.warns(UserWarning, match="1 of 2 tasks are not scored, as some of their texts were not encoded .*: t$"):
        scores, means = score_tasks(evaluation, vectors, {})
    assert list(scores) == ["s"]
    assert means["mean_task"] == scores["s"]["spearman"] == pytest.approx(1.0)
    with pytest.warns(UserWarning, match="2 of 2 tasks are not scored"):
        assert score_tasks(evaluation, {}, {}) == ({}, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from what ranx imports
@pytest.mark.filterwarnings("ignore:The dataloader:UserWarning")  # advice only
def test_a_part_of_the_texts_gives_no_score_of_a_task_it_cuts(tmp_path: Path) -> None:
    module: Any = worker.boom()
    data: Any = worker.data(module)
    data.token_budget = 256
    run = worker.trainer(tmp_path, "auto", 1, TaskReport(tmp_path), limit_val_batches=0.95)  # the last are the shortest
    with pytest.warns(UserWarning, match="tasks are not scored"):
        run.validate(module, data, verbose=False)
    scored = {name.split("/")[1] for name in read_json(tmp_path / "validation.json")} & {
        task.name for task, _, _ in data.evaluation("validate")
    }
    assert 0 < len(scored) < len(data.evaluation("validate"))
    assert scored == set(module.task_scores)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from what ranx imports
def test_every_task_is_scored_on_its_own_texts(tmp_path: Path) -> None:
    module: Any = worker.boom()
    run = worker.trainer(tmp_path, "auto", 1)
    data: Any = worker.data(module)
    run.test(module, data, verbose=False)
    tasks = [task for task, _, _ in data.evaluation("test")]
    scores = {}
    for task in tasks:
        queries = [instruct(task.instruction, text) for text in task.queries.values()]
        sides = [module.encoder.encode(queries, "query")]
        if task.passages:
            sides.append(module.encoder.encode(list(task.passages.values()), "passage"))
        keyed = [
            dict(zip(ids, side, strict=True)) for ids, side in zip((task.queries, task.passages), sides, strict=False)
        ]
        scores[task.name] = task.score(*keyed, *([] if task.passages else [{}]))
    for task in tasks:
        assert module.task_scores[task.name] == pytest.approx(scores[task.name], abs=2e-2)
        logged = float(run.callback_metrics[f"test/{task.name}/{task.main}"])
        assert logged == pytest.approx(module.task_scores[task.name][task.main], abs=1e-6)
    assert module.task_means == pytest.approx(mean_scores(module.task_scores, tasks), abs=1e-12)
    for name in ("mean_task", "mean_type", "in_domain", "out_of_domain"):
        assert float(run.callback_metrics[f"test/{name}"]) == pytest.approx(module.task_means[name], abs=1e-6)


@pytest.mark.slow
def test_members_start_from_one_exported_folder(tmp_path: Path) -> None:
    base: Any = worker.boom()
    worker.fit(base, tmp_path, "auto", 1)
    base.export(tmp_path / "base")
    member: Any = Boom(str(tmp_path / "base"), encoder=EncoderConfig(query_length=24, passage_length=48))
    member.configure_model()
    texts = ["the 42", "a vessel"]
    expected = base.encoder.encode(texts, "query")
    torch.testing.assert_close(member.encoder.encode(texts, "query"), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        build_encoder(str(tmp_path / "base")).encode(texts, "query"), expected, atol=1e-5, rtol=0
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dataloader:UserWarning")  # advice only
def test_another_bag_is_refused_where_a_member_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    worker.fit(worker.boom(), tmp_path, "auto", 3, worker.SaveAt(path, 2))
    from lit_embed.data.bagging import Bag

    other = TaskDataModule(families=worker.FAMILIES, bag=Bag(10, member=1), batch_size=8, negatives=2)
    with pytest.raises(InputError, match="this member was begun on other data: bag/member was 0, is 1"):
        worker.trainer(tmp_path, "auto", 3).fit(worker.boom(), other, ckpt_path=path, weights_only=True)
