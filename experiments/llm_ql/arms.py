"""What LLM-QL is compared with.

Every arm starts from one language model, trained on unpaired texts, which stands for the pre-trained backbone, and a
seed's arms see the same pairs in the same order. ``contrastive_equal`` sees as many pairs as both stages of LLM-QL.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.retrieval import exported, finish, rank_test_queries, word_arm
from lit_core.cli import Spec
from lit_core.errors import InputError
from lit_core.presets import is_preset
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment, write_results
from lit_core.setting import Setting
from lit_embed.methods.llm_ql import SMALL_GAP, small_gap
from lit_embed.retrieval.bm25 import BM25
from lit_embed.retrieval.word_ql import WordQueryLikelihood

QL, CONTRASTIVE = "query_likelihood", "contrastive"
NO_STOP, NO_CORRUPTION = "--model.attention_stop=false", "--model.corruption=0.0"
PRIOR_FLAGS = (  # which of the user's flags the language model takes too
    *("--model.backbone", "--model.loading", "--data.world", "--data.num_workers"),
    *("--trainer.accelerator", "--trainer.devices", "--trainer.precision", "--trainer.logger"),
)
PRIOR = Spec(
    name="prior",
    summary="Causal language model on unpaired texts.",
    folder=Path(__file__).parent / "prior",
    method="lit_embed.methods.causal_lm:CausalLM",
    data="lit_embed.data.text_datamodule:TextDataModule",
    arms="",
)


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""
    needs = ("prior",) if is_preset(setting.value(CONTRASTIVE, "model.backbone")) else ()

    def two_stages(name: str, title: str, flags: Sequence[str], main: bool = False) -> Arm:
        return Arm(name, title, lambda context: _two_stages(setting, context, flags), main=main, needs=needs)

    arms = (
        Arm("prior", "language model", lambda context: _prior(setting, context), main=False, seeded=False, hidden=True),
        word_arm(setting, "bm25", "BM25", BM25, main=True),
        word_arm(setting, "ql_dirichlet", "word QL, Dirichlet", WordQueryLikelihood, main=False),
        word_arm(
            setting,
            "ql_jelinek_mercer",
            "word QL, Jelinek-Mercer",
            lambda corpus: WordQueryLikelihood(corpus, "jelinek_mercer"),
            main=False,
        ),
        Arm("contrastive", "contrastive alone", lambda c: _contrastive(setting, c, False), main=False, needs=needs),
        Arm("contrastive_equal", "contrastive, equal compute", lambda c: _contrastive(setting, c, True), needs=needs),
        two_stages("llm_ql", "LLM-QL", [], main=True),
        two_stages("no_stop", "LLM-QL without attention stop", [NO_STOP]),
        two_stages("no_corruption", "LLM-QL without corruption", [NO_CORRUPTION]),
        two_stages("corruption_60", "LLM-QL, 60 % hidden", ["--model.corruption=0.6"]),
        two_stages(
            "language_model",
            "plain LM on document and query",
            [NO_STOP, NO_CORRUPTION, "--model.loss_scope=document_and_query"],
        ),
        Arm("rerank", "QL re-ranking of BM25", lambda c: _rerank(setting, c), main=False, needs=("llm_ql",)),
    )
    metric = "ndcg@10"
    claims = (
        Claim("The QL stage beats contrastive training on as many pairs", metric, "llm_ql", "contrastive_equal"),
        Claim("LLM-QL beats BM25", metric, "llm_ql", "bm25"),
        Claim("The QL stage helps the same contrastive stage", metric, "llm_ql", "contrastive"),
        Claim("Attention stop helps the retriever", metric, "llm_ql", "no_stop"),
        Claim("Input corruption helps the retriever", metric, "llm_ql", "no_corruption"),
        Claim("LLM-QL beats plain language modelling of the pairs", metric, "llm_ql", "language_model"),
        Claim("QL re-ranking beats its first stage", metric, "rerank", "bm25"),
        Claim("QL re-ranking beats word-based QL", metric, "rerank", "ql_dirichlet"),
    )
    fingerprint = "\n".join((setting.fingerprint(), replace(setting, spec=PRIOR).fingerprint()))
    return Experiment("llm_ql", arms, claims, ("ndcg@10", "mrr@10", "recall@100", "ql_gap"), fingerprint)


def _prior(setting: Setting, context: ArmContext) -> None:
    flags = tuple(flag for flag in setting.flags if flag.startswith(PRIOR_FLAGS))
    cli = replace(setting, flags=flags).fit(context.folder / "fit", context.seed, spec=PRIOR)
    exported(cli, context.folder / "export")
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)  # a restart may have missed the last one
    loss = float(cli.trainer.callback_metrics["val/loss"])
    cost = {"tokens": float(cli.throughput.tokens), "steps": float(cli.trainer.global_step)}
    write_results(context.folder, {"val/loss": loss}, cost=cost)


def _contrastive(setting: Setting, context: ArmContext, equal: bool) -> None:
    flags = _start(context)
    if equal:
        flags.append(f"--trainer.max_steps={_equal_steps(setting)}")
    cli = setting.fit(context.folder / CONTRASTIVE, context.seed, flags, CONTRASTIVE)
    rank_test_queries(context, cli)


def _equal_steps(setting: Setting) -> int:
    """Contrastive steps that see as many pairs as both stages together."""
    steps = {stage: setting.value(stage, "trainer.max_steps") for stage in (QL, CONTRASTIVE)}
    if min(steps.values()) < 1:
        raise InputError("equal compute is counted in steps: state them", field="trainer.max_steps")
    size = {stage: setting.value(stage, "data.batch_size") for stage in steps}
    return math.ceil(sum(steps[stage] * size[stage] for stage in steps) / size[CONTRASTIVE])


def _two_stages(setting: Setting, context: ArmContext, flags: Sequence[str]) -> None:
    first = context.folder / QL
    cli = setting.fit(first, context.seed, [*_start(context), *flags], QL)
    gap = _gap(context, cli)
    backbone = exported(cli, first / "export")
    second = setting.fit(context.folder / CONTRASTIVE, context.seed, [f"--model.backbone={backbone}"], CONTRASTIVE)
    rank_test_queries(context, second, gap, earlier=cli)


def _gap(context: ArmContext, cli: Any) -> dict[str, float]:
    """Nats a token by which the true document tells more of its query than another one, after the last step."""
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    gap = float(cli.trainer.callback_metrics.get("val/ql_gap", math.nan))  # without validation pairs there is none
    if gap < SMALL_GAP:
        print(f"{context.arm} seed {context.seed}: {small_gap(gap)}", flush=True)
    return {} if math.isnan(gap) else {"ql_gap": gap}


def _rerank(setting: Setting, context: ArmContext) -> None:
    checkpoint = context.of("llm_ql") / QL / "last.ckpt"
    cli = setting.test(context.folder / QL, context.seed, checkpoint, QL)
    runs: Any = cli.model
    found = next((run for name, run in runs.runs.items() if name.startswith("QL")), None)
    if found is None:
        raise InputError("the arm needs documents to re-rank, got 0", field="model.rerank_top_k")
    finish(context, found, cli.datamodule.collection("test").qrels)


def _start(context: ArmContext) -> list[str]:
    return [f"--model.backbone={context.of('prior') / 'export'}"] if "prior" in context.needed else []
