"""The built-in families of tasks: several training sets and evaluation tasks over the built-in world's vocabulary.

The kinds of thing and the attributes of ``lit_embed.data.world.lexicon`` are divided among five domains, so that no
word of content belongs to two. In the domains trained on, sets of clearly different sizes pose tasks of six types
(retrieval, reranking, classification, clustering, similarity, duplicate questions); the held-out domains are evaluated
alone. The sets for pre-training a base cover all domains thinly, so that a base has something to forget there.

What a test score means: each text states one kind and one value of both attributes of its domain, its *meaning*, and
the meanings are divided among training, validation and test. No meaning of a test text was seen in training, least of
all its text; the words were, and training teaches which words say the same and what a task asks for.
"""

from lit_embed.data.families.config import Families, FamiliesConfig, TrainTask
from lit_embed.data.families.domains import DOMAINS, Domain
from lit_embed.data.families.families import build_families, plan

__all__ = ["DOMAINS", "Domain", "Families", "FamiliesConfig", "TrainTask", "build_families", "plan"]
