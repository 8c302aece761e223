"""The built-in collection: made from a seed, nothing to download, every relevance judgement exact.

Things (ships, lamps, towers, ...) have names, a kind, typed attributes and relations to each other. Each kind, value,
attribute phrase and relation is a *concept* with forms that passages use and other forms that questions use. Passages
state what is so, mention other things on the way, are told twice (near-duplicates) or have a sibling with one attribute
changed (counterfactuals). Questions describe a thing without its name, or ask for an attribute of the thing related to
it (multi-hop). A retriever has to learn which words mean the same and which facts belong to which thing.

What a test score means: entities are divided among the splits, siblings and relations included, and no document about
another split's entity is relevant to a question. So no relevant document of a test question was a positive in
training, and no question text occurs in two splits; the concepts are shared, that is what training teaches.
``World.corpus`` has the passages of all splits; the data module ranks only those about entities outside training. The
unpaired ``texts`` stand in for a language model's prior: they say which words mean the same, in sentences about nothing
in the corpus.
"""

from lit_embed.data.world.facts import Document, Entity, FactIndex, Hop, Question
from lit_embed.data.world.world import World, WorldConfig, build_world

__all__ = ["Document", "Entity", "FactIndex", "Hop", "Question", "World", "WorldConfig", "build_world"]
