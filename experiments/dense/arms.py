"""Dense retrieval against word rankers, and what hard negatives and the symmetric loss add."""

from collections.abc import Sequence

from experiments.retrieval import rank_test_queries, word_arm
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment
from lit_core.setting import Setting
from lit_embed.retrieval.bm25 import BM25
from lit_embed.retrieval.word_ql import WordQueryLikelihood

IN_BATCH = "--data.negatives=0"
BM25_NEGATIVES = ("--data.negatives=1", "--data.hard_negatives=bm25")
BIDIRECTIONAL = (IN_BATCH, "--model.backbone=tiny-bert", "--model.encoder.pooling=mean")


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale; that of the paper has hard negatives in its data, and no tiny backbone."""
    paper = setting.scale == "paper"

    def trained(name: str, title: str, flags: Sequence[str] = (), main: bool = True) -> Arm:
        def run(context: ArmContext) -> None:
            rank_test_queries(context, setting.fit(context.folder / "fit", context.seed, flags))

        return Arm(name, title, run, main=main)

    arms = (
        word_arm(setting, "bm25", "BM25", BM25, main=True),
        word_arm(setting, "ql_dirichlet", "word QL, Dirichlet", WordQueryLikelihood, main=False),
        trained("dense", "dense, in-batch negatives", [IN_BATCH]),
        trained("hard", f"dense, {'its' if paper else 'BM25'} hard negatives", [] if paper else BM25_NEGATIVES),
        trained("symmetric", "dense, symmetric loss", [IN_BATCH, "--model.symmetric=true"], main=False),
        *([] if paper else [trained("bidirectional", "dense, bidirectional backbone", BIDIRECTIONAL, main=False)]),
    )
    claims = (
        Claim("A trained bi-encoder beats BM25", "ndcg@10", "dense", "bm25"),
        Claim("Hard negatives help", "ndcg@10", "hard", "dense"),
        Claim("The symmetric loss helps", "ndcg@10", "symmetric", "dense"),
    )
    return Experiment("dense", arms, claims, ("ndcg@10", "mrr@10", "recall@100"), setting.fingerprint())
