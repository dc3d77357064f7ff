"""Benchmarks for machines that tests do not run on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.long
def test_gpu_benchmark_on_tiny_problems(tmp_path):
    figures = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--rounds", "1", "--ways", "sdpa_cudnn", "sdpa_flash"]
    subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *options, "--json", figures],
        check=True,
        capture_output=True,
    )
    rows = json.loads(figures.read_text())["rows"]
    ours = [row for row in rows if row["way"] == "ours"]
    assert len(ours) == 4 and all(row["milliseconds"] > 0 for row in ours)
    # What a machine does not have is skipped.
    assert all("backend" in row["skipped"] for row in rows if row["way"] == "sdpa_cudnn")
