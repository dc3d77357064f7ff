"""Draws the pictures of docs/choosing-a-window.md into docs/images, from the simulator.

python tools/draw_costs.py [--out docs/images]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from natten.simulator import sweep, text_of

PREDICTED, USEFUL = "#b9d9f3", "#3182bd"
COMMON = {"dtype": "bfloat16", "device": "h100"}
# Layers of an image model, a video model and a model of weather on a sphere.
FLUX = dict(input_size=(256, 256), kernel_size=80, heads=24, head_dim=128, **COMMON)
HUNYUAN = dict(input_size=(30, 48, 80), kernel_size=(18, 24, 24), heads=24, head_dim=128, **COMMON)
WEATHER = dict(
    input_size=(180, 360),
    kernel_size=16,
    heads=8,
    head_dim=64,
    boundary=("cut", "circular"),
    **COMMON,
)
TITLES = {
    "FLUX layer, 256x256": FLUX,
    "Hunyuan layer, 30x48x80": HUNYUAN,
    "weather, 180x360": WEATHER,
}


def bars(axes: Axes, what: str, problem: dict[str, Any], title: str) -> None:
    points = [p for p in sweep(what, **problem) if p.simulation]
    names = [p.value for p in points]
    times = [1e3 * p.simulation.seconds for p in points if p.simulation]
    useful = [
        t * p.simulation.useful_flops / p.simulation.executed_flops
        for t, p in zip(times, points, strict=True)
        if p.simulation
    ]
    axes.bar(names, times, color=PREDICTED, label="predicted time")
    axes.bar(names, useful, color=USEFUL, label="share of pairs that see each other")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(what)
    axes.set_ylabel("milliseconds")
    axes.tick_params(axis="x", labelrotation=60, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(what: str, path: Path) -> None:
    figure, row = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axes, (title, problem) in zip(row, TITLES.items(), strict=True):
        window = f", window {text_of(problem['kernel_size'])}" if what == "stride" else ""
        bars(axes, what, problem, title + window)
        if what == "kernel":
            axes.set_yscale("log")
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent.parent / "docs" / "images"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    for what in ("stride", "kernel"):
        draw(what, out / f"cost_of_{what}.png")


if __name__ == "__main__":
    main()
