"""The GPU benchmark runs where there is no GPU, and says what it is worth there."""
import subprocess, sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent / "bench"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark itself is the test")
def test_a_slice_on_the_cpu():
    done = subprocess.run([sys.executable, BENCH / "gpu_slice.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No GPU" in done.stdout and "no figure below says anything about a GPU" in done.stdout
    for row in ("eager attention, float32", "bfloat16 autocast", "sdpa", "flash-attn", "compiled layers", "chunked cross-entropy", "activation checkpointing"):
        assert done.stdout.count(f"\n{row:26} ") == 2, "one row for each length"
    assert done.stdout.splitlines()[-1].startswith("ratio: ")
