"""Two CPU processes that share one encoder's weights (FSDP2), against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(Path(__file__).parent))  # for sharded_worker, which is a program as well


@pytest.mark.slow
def test_ranks_with_and_without_images_get_the_vectors_and_gradients_of_one_process(tmp_path: Path) -> None:
    """Rank 0 has three texts, rank 1 four items, three with images: both must run both towers equally often."""
    import sharded_worker as worker

    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker.__file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]
    ranks = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1)]
    one = worker.run(worker.build(), [*worker.TEXTS, *worker.SHOWN])
    torch.testing.assert_close(torch.cat([part["vectors"] for part in ranks]), one["vectors"], atol=1e-5, rtol=0)
    assert any(".visual." in name for name in one["gradients"])
    for name, gradient in one["gradients"].items():
        for part in ranks:
            torch.testing.assert_close(part["gradients"][name], gradient, atol=1e-6, rtol=1e-3, msg=name)
