"""Build the vocabulary of the tiny presets: ``python tools/build_preset_vocabulary.py``.

It is learnt from the English of the standard library's docstrings, from the words of the built-in world (repeated, so
that each becomes one token) and from its way of making names. The result is committed: other versions of Python
have other docstrings, so a rebuild changes token ids and with them every result of the presets.
"""

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lit_core.files import write_text
from lit_core.presets import SPECIAL_TOKENS, VOCAB_SIZE, byte_level_tokenizer
from lit_embed.data.world.wording import entity_name, words

OUTPUT = Path(__file__).parents[1] / "lit_core" / "presets_data" / "merges.json"
WORD_REPEATS = 2000  # more than any chance pair of the docstrings
NAMES = 20000


def docstrings() -> Iterator[str]:
    """Yield the docstrings of the standard library's top-level modules, in the order of the files' names."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def main() -> None:
    """Learn the merges and write them."""
    from tokenizers import pre_tokenizers, trainers

    rng = random.Random(0)
    texts = [*docstrings(), *(f"{word} " * WORD_REPEATS for word in [*words(), "_"])]
    texts += [" ".join(entity_name(rng) for _ in range(NAMES))]
    tokenizer = byte_level_tokenizer({}, [])
    size = VOCAB_SIZE - SPECIAL_TOKENS
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    lines = ",\n".join(json.dumps(f"{left} {right}", ensure_ascii=False) for left, right in merges)
    write_text(OUTPUT, f"[\n{lines}\n]\n")
    print(f"{OUTPUT}: {len(merges)} merges", file=sys.stderr)


if __name__ == "__main__":
    main()
