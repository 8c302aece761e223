"""What runs leave behind for the report's pictures: retrieved candidates, and reconstructed words."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.files import atomic_path, write_json
from lit_core.lm_head import IGNORE_INDEX
from lit_embed.items import MARKER, Item, Kind
from lit_embed.methods.cocoa import CoCoA
from lit_embed.modules.content import reconstruct
from lit_embed.multimodal import ChoiceTask, Key, ReconstructionRow
from lit_embed.retrieval.precision import top_candidates

SIDE = 112  # pixels of a picture that is kept
TOP = 5
HIDDEN = "□"


class Album:
    """Pictures that a report shows, in one file.

    Args:
        path: ``.npz`` to write.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.pictures = path, list[Any]()

    def add(self, item: Item) -> dict[str, Any]:
        """Keep an item's picture; returns its text and the picture's number."""
        text = " ".join(item.text.replace(MARKER, "").split())
        if item.image is None:
            return {"text": text, "picture": None}
        self.pictures.append(np.asarray(item.image.load().resize((SIDE, SIDE))))
        return {"text": text, "picture": len(self.pictures) - 1}

    def write(self) -> None:
        """Write the file, whole or not at all."""
        with atomic_path(self.path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, pictures=np.stack(self.pictures or [np.zeros((SIDE, SIDE, 3), np.uint8)]))


def write_retrieval(
    folder: Path, vectors: Mapping[Kind, Mapping[Key, Tensor]], tasks: Sequence[ChoiceTask], each: int = 1
) -> None:
    """The best candidates of the first queries of each task: ``retrieval.json`` and ``retrieval.npz``.

    What was left out because its image cannot be read, and so has a vector of length 0, is not shown.
    """
    queries, targets = vectors["query"], vectors["passage"]
    album, rows = Album(folder / "retrieval.npz"), []
    for task in tasks:
        chosen = [number for number, query in enumerate(task.queries) if queries[query.key].any()][:each]
        best = top_candidates(queries, task, TOP, chosen, normalize=False, targets=targets)
        for number, ranked in zip(chosen, best, strict=True):
            candidates = [{**album.add(one.item), "score": one.score, "right": one.right} for one in ranked
                          if targets[one.item.key].any()]  # fmt: skip
            rows.append({"task": task.name, "query": album.add(task.queries[number]), "candidates": candidates})
    album.write()
    write_json(folder / "retrieval.json", rows)


def write_reconstructions(folder: Path, module: CoCoA, rows: Sequence[ReconstructionRow]) -> None:
    """Hidden words as the bridge tells them, and behind another query: ``words.json`` and ``words.npz``.

    Rows of which nothing can be made, such as those whose image was left out, are not shown.
    """
    collate = module.multimodal_collator("reconstruction", train=False)
    rows = [row for row in rows if _is_whole(collate, row)]
    if not rows:
        return
    batch = collate(rows)
    album, tokenizer = Album(folder / "words.npz"), module.encoder.tokenizer
    true = reconstruct(module.encoder, batch, module.bridge, module.form)
    other = reconstruct(module.encoder, batch.shuffled or batch, module.bridge, module.form)
    texts = []
    ends = [end + 1 for end in batch.tokens.ends]
    parts = (batch.tokens.ids.split(batch.tokens.lengths), batch.labels.split(batch.tokens.lengths),
             true.split(batch.tokens.lengths))  # fmt: skip
    others = other.split((batch.shuffled or batch).tokens.lengths)
    for row, end, ids, labels, told, wrong in zip(rows, ends, *parts, others, strict=True):
        hidden = labels[end:] != IGNORE_INDEX
        length = len(ids) - end
        shown = [HIDDEN if flag else tokenizer.decode([token]).strip()
                 for token, flag in zip(ids[end:].tolist(), hidden.tolist(), strict=True)]  # fmt: skip
        texts.append({
            **album.add(row.query), "target": row.target, "shown": " ".join(shown),
            "told": tokenizer.decode(torch.where(hidden, told[end:], ids[end:]).tolist()),
            "without": tokenizer.decode(torch.where(hidden, wrong[-length:], ids[end:]).tolist()),
        })  # fmt: skip
    album.write()
    write_json(folder / "words.json", texts)


def _is_whole(collate: Callable[[list[ReconstructionRow]], Any], row: ReconstructionRow) -> bool:
    try:
        collate([row])
    except InputError:
        return False
    return True
