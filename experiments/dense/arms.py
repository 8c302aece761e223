"""Dense retrieval against word rankers, and what hard negatives and the symmetric loss add."""

from collections.abc import Sequence

from experiments.retrieval import rank_test_queries, word_arm
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment
from lit_core.setting import Setting
from lit_embed.retrieval.bm25 import BM25
from lit_embed.retrieval.word_ql import WordQueryLikelihood


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""

    def trained(name: str, title: str, flags: Sequence[str] = (), main: bool = True) -> Arm:
        def run(context: ArmContext) -> None:
            rank_test_queries(context, setting.fit(context.folder / "fit", context.seed, flags))

        return Arm(name, title, run, main=main)

    arms = (
        word_arm(setting, "bm25", "BM25", BM25, main=True),
        word_arm(setting, "ql_dirichlet", "word QL, Dirichlet", WordQueryLikelihood, main=False),
        trained("dense", "dense, in-batch negatives"),
        trained("hard", "dense, BM25 hard negatives", ["--data.negatives=1", "--data.hard_negatives=bm25"]),
        trained("symmetric", "dense, symmetric loss", ["--model.symmetric=true"], main=False),
        trained("bidirectional", "dense, bidirectional backbone", ["--model.backbone=tiny-bert", MEAN], main=False),
    )
    claims = (
        Claim("A trained bi-encoder beats BM25", "ndcg@10", "dense", "bm25"),
        Claim("BM25 hard negatives help", "ndcg@10", "hard", "dense"),
        Claim("The symmetric loss helps", "ndcg@10", "symmetric", "dense"),
    )
    return Experiment("dense", arms, claims, ("ndcg@10", "mrr@10", "recall@100"), setting.fingerprint())


MEAN = "--model.encoder.pooling=mean"
