import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_core.presets import preset_tokenizer
from lit_rl.data.domains import DomainConfig, DomainDataModule
from lit_rl.data.small_tasks import SmallTaskConfig
from lit_rl.problems import DemonstrationCollator, PromptCollator, PromptConfig

SMALL = SmallTaskConfig(count=30)


def built_in(share: float = 1.0) -> dict[str, DomainConfig]:
    return {
        "math": DomainConfig("sums", share=share, small=SMALL, held_out=6),
        "chat": DomainConfig("chat_words", small=SMALL, held_out=3),
        "if": DomainConfig("constraints", small=SMALL, held_out=3),
    }


def attached(data: DomainDataModule, rank: int = 0, world_size: int = 1, imitates: bool = False) -> DomainDataModule:
    tokenizer, config = preset_tokenizer("nano-qwen3"), PromptConfig()
    method = SimpleNamespace(prompt=config, prompt_collator=lambda: PromptCollator(tokenizer, config))
    if imitates:
        method.demonstration_collator = lambda: DemonstrationCollator(tokenizer, config)
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=world_size, lightning_module=method)
    data.trainer = trainer
    data.setup("fit")
    return data


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(count: int = 20) -> list[dict[str, Any]]:
    math = [{"ability": "math", "numbers": [n, 1], "solution": str(n + 1)} for n in range(count)]
    chat = [{"domain": "chat", "ability": "other", "topics": ["sea"]} for _ in range(count)]
    return [row for pair in zip(math, chat, strict=True) for row in pair]


FILE = {"math": DomainConfig("sums"), "chat": DomainConfig("chat_words")}


def test_batches_have_their_quotas_and_evaluations_all_domains() -> None:
    data = attached(DomainDataModule(built_in(share=2), batch_size=8, eval_batch_size=4))
    batches = list(data.train_dataloader())
    assert len(batches) == 90 // 8
    for batch in batches:
        assert [problem.domain for problem in batch.problems] == ["math"] * 4 + ["chat"] * 2 + ["if"] * 2
        assert {problem.task for problem in batch.problems} == {"sums", "chat_words", "constraints"}
    every = [problem for problems in data.splits.values() for problem in problems]
    assert len({problem.id for problem in every}) == len(every) == 90 + 2 * 12
    first = next(iter(data.val_dataloader()))
    assert Counter(problem.domain for problem in first.problems) == {"math": 2, "chat": 1, "if": 1}
    assert next(iter(attached(DomainDataModule(built_in(), batch_size=6), imitates=True).train_dataloader())).solutions


@pytest.mark.parametrize("synchronous", [False, True])
def test_ranks_share_the_quotas(synchronous: bool) -> None:
    modules = [DomainDataModule(built_in(), batch_size=4, synchronous=synchronous) for _ in range(2)]
    loaders = [attached(module, rank, 2).train_dataloader() for rank, module in enumerate(modules)]
    for batches in zip(*loaders, strict=True):
        names = [[problem.domain for problem in batch.problems] for batch in batches]
        assert [len(part) for part in names] == [4, 4]
        whole = Counter(names[0] + names[1])
        assert whole == ({"math": 4, "chat": 2, "if": 2} if synchronous else {"math": 3, "chat": 3, "if": 2})
        assert names[0] == names[1] or not synchronous
        assert len({problem.id for batch in batches for problem in batch.problems}) == 8


def test_a_fit_sees_the_same_problems_after_a_restart() -> None:
    def ids(batches: Any) -> list[list[int]]:
        return [[problem.id for problem in batch.problems] for batch in batches]

    def loader() -> Any:
        return attached(DomainDataModule(built_in(), batch_size=9, quotas="random", seed=4)).train_dataloader()

    whole, cut, other = loader(), loader(), loader()
    batches = iter(cut)
    seen = ids(next(batches) for _ in range(4))
    other.load_state_dict(cut.state_dict())
    assert seen + ids(other) == ids(whole)


def test_one_file_holds_several_domains(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", labelled())
    domains = {**FILE, "if": DomainConfig("constraints", path="constraints", small=SMALL, held_out=2)}
    data = attached(DomainDataModule(domains, path, batch_size=6))
    sizes = {name: Counter(problem.domain for problem in found) for name, found in data.splits.items()}
    assert sizes == {
        "train": {"math": 18, "chat": 18, "if": 30},
        "val": {"math": 1, "chat": 1, "if": 2},
        "test": {"math": 1, "chat": 1, "if": 2},
    }
    write(tmp_path / "test.jsonl", labelled(5))
    data = attached(DomainDataModule(FILE, str(tmp_path), batch_size=2))
    assert {name: len(found) for name, found in data.splits.items()} == {"train": 38, "val": 2, "test": 10}


def test_the_domains_of_the_paper_from_files(tmp_path: Path) -> None:
    rules = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    rows: dict[str, list[dict[str, Any]]] = {
        "math": [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(10)],
        "preference": [{"prompt": f"Say {n}."} for n in range(10)],
        "instructions_share": [{"prompt": f"Say {n}.", **rules} for n in range(10)],
    }
    domains = {task[:4]: DomainConfig(task, write(tmp_path / f"{task}.jsonl", found)) for task, found in rows.items()}
    batch = next(iter(attached(DomainDataModule(domains, batch_size=3)).train_dataloader()))
    assert [problem.task for problem in batch.problems] == list(rows)
    assert [problem.domain for problem in batch.problems] == ["math", "pref", "inst"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([*labelled(4), {"domain": "law", "topics": ["sea"]}], "p.jsonl:9: field 'domain': must be one of math, chat, "
                                                                "got 'law'"),
        ([*labelled(4), {"topics": ["sea"]}], "p.jsonl:9: field 'domain or ability': is missing"),
        ([{"domain": "math"}], "p.jsonl:1: field 'numbers': is missing"),
        (labelled(9)[::2], "p.jsonl: no row is of the domain 'chat'"),
        (labelled(1), "domain 'math': needs at least two problems"),
        ([], "p.jsonl: no row is of the domain 'math'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_told_with_their_place(tmp_path: Path, rows: list[dict[str, Any]], told: str) -> None:
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(InputError) as caught:
        attached(DomainDataModule(FILE, path, batch_size=2))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_arguments() -> None:
    with pytest.raises(InputError, match="field 'share': must be above 0, got 0"):
        DomainConfig("sums", share=0)
    with pytest.raises(InputError, match="at least one domain"):
        DomainDataModule({})
    with pytest.raises(InputError, match=r"field 'a\.task': must be one of"):
        DomainDataModule({"a": DomainConfig("law")})
    with pytest.raises(InputError, match=r"field 'a\.path': the task math has no built-in problems"):
        DomainDataModule({"a": DomainConfig("math")})
    with pytest.raises(InputError, match=r"field 'a\.path': val_path, test_path and hf_config need a path beside them"):
        DomainDataModule({"a": DomainConfig("sums", val_path="v.jsonl")})
    with pytest.raises(InputError, match="field 'path': val_path, test_path and hf_config need a path of several"):
        DomainDataModule(built_in(), test_path="t.jsonl")
    with pytest.raises(InputError, match=r"p\.jsonl: every domain has a path of its own"):
        DomainDataModule({"a": DomainConfig("sums", path="sums")}, "p.jsonl")
    with pytest.raises(InputError, match="got 'domain_mean'"):
        DomainDataModule({"domain_mean": DomainConfig("sums")})
    with pytest.raises(InputError, match="got 'a/b'"):
        DomainDataModule({"a/b": DomainConfig("sums")})
    with pytest.raises(InputError, match=r"domain 'chat' has .* none of a batch of 2; raise batch_size or its share"):
        attached(DomainDataModule(built_in(share=9), batch_size=2)).train_dataloader()
    with pytest.raises(InputError, match="domain 'math' has 30 rows, too few for its 40 of a batch of 120"):
        attached(DomainDataModule(built_in(), batch_size=120)).train_dataloader()
