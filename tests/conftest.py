import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an unknown backbone is refused at once
torch.set_num_threads(1)  # tests run side by side
sys.path.insert(0, str(Path(__file__).parent / "support"))  # a folder of its own: that above has one called lit_core


@pytest.fixture(autouse=True)
def _program_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real collections beside the checkout; the test is skipped where they are missing."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real collections are not here: {folder} is missing")
    return folder
