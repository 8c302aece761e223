"""What text embeddings are judged by: the task types of MTEB, each a set of texts and a score of their vectors."""

from lit_embed.retrieval.tasks.labelled import Classification, Clustering
from lit_embed.retrieval.tasks.pairs import PairClassification, Sts
from lit_embed.retrieval.tasks.ranked import Reranking, Retrieval
from lit_embed.retrieval.tasks.task import EvalTask, TaskType, TextVectors, mean_scores

__all__ = [
    "Classification",
    "Clustering",
    "EvalTask",
    "PairClassification",
    "Reranking",
    "Retrieval",
    "Sts",
    "TaskType",
    "TextVectors",
    "mean_scores",
]
