"""Benchmarks that no other test runs, shortened."""

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


def figures_of(tmp_path: Path, script: str, *options: str) -> dict:
    figures = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / script, *options, "--json", figures]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(figures.read_text())


def rows_of(tmp_path: Path, script: str, *options: str) -> list[dict]:
    return figures_of(tmp_path, script, *options, "--repeats", "1")["rows"]


@pytest.mark.long
def test_benchmark_of_borders(tmp_path):
    rows = rows_of(tmp_path, "borders.py", "--cases", "1d_8k_w127", "2d_nat56_k7", "2d_64_k7s7")
    assert [row["case"] for row in rows] == ["2d_nat56_k7"] * 2 + ["2d_64_k7s7"] * 2
    assert all(row[name] > 0 for row in rows for name in ("cut", "mask", "part"))
    assert [row["circular"] is None for row in rows] == [False, False, True, True]


@pytest.mark.long
def test_benchmark_of_streams(tmp_path):
    rows = rows_of(tmp_path, "stream.py", "--tiny")
    assert [row["stream"] for row in rows] == ["1d_token", "2d_row", "3d_frame"]
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.long
def test_benchmark_of_meshes(tmp_path):
    options = ("--size", "32", "--window", "5", "--rounds", "1", "--backward", "--link", "1e9")
    figures = figures_of(tmp_path, "mesh.py", *options)
    assert all(figures[name] > 0 for name in ("whole", "mesh", "compute", "exchange"))


@pytest.mark.long
def test_benchmark_of_links(tmp_path):
    figures = figures_of(tmp_path, "link.py", "--tiny", "--rounds", "1")
    assert [row["what"] for row in figures["rows"]] == ["halo", "call"]
    assert all(row["measured"] > 0 < row["predicted"] for row in figures["rows"])
