"""Draws the times that cpu.py measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from cases import CASES, MODELS, Case, case_named
from matplotlib.patches import Patch

# What is drawn: ways to compute the same thing. The tables have the rest.
WAYS = {
    "ours": ("natten", "#d9480f"),
    "flex": ("FlexAttention, compiled", "#1c7ed6"),
    "sdpa_mask": ("scaled_dot_product_attention, masked", "#2b8a3e"),
    "gather": ("keys gathered by hand", "#868e96"),
}
INK = "#333333"
GRID = "#c9ced6"


def describe(case: Case) -> str:
    """Two lines: the grid, and the window."""

    def by(sizes: tuple[int, ...]) -> str:
        return " \N{MULTIPLICATION SIGN} ".join(map(str, sizes))

    window = [f"window {by(case.kernel)}"]
    if case.stride != 1:
        window.append(f"stride {case.stride}")
    if case.dilation != 1:
        window.append(f"dilation {case.dilation}")
    if case.is_causal:
        window.append("causal")
    if case.has_bias:
        window.append("bias")
    return f"{by(case.grid)} tokens, {case.heads} heads of {case.head_dim}\n{', '.join(window)}"


def draw(machine: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratio to the matrix product: cases from top to bottom, a panel per pass."""
    timed = [row for row in rows if "ratio" in row and row["way"] in WAYS]
    timed.sort(key=lambda row: list(WAYS).index(row["way"]))
    timed.sort(key=lambda row: (CASES + MODELS).index(case_named(row["case"])))
    passes = list(dict.fromkeys(row["pass"] for row in timed))
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    places: dict[tuple[str, str, str], float] = {}  # of case, dtype and way
    labels: dict[str, list[float]] = {}
    y = 0.0
    for row in timed:
        key = (row["case"], row["dtype"], row["way"])
        if key in places:
            continue
        label = describe(case_named(row["case"]))
        label += f", {row['dtype']}" if len(dtypes) > 1 else ""
        if labels and label not in labels:
            y += 0.8
        places[key] = y
        labels.setdefault(label, []).append(y)
        y += 1

    figure, panels = plt.subplots(
        1,
        len(passes),
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(11, 1.6 + 0.24 * y),
        layout="constrained",
    )
    for panel, name in zip(panels[0], passes, strict=True):
        here = [row for row in timed if row["pass"] == name]
        bars = panel.barh(
            [places[row["case"], row["dtype"], row["way"]] for row in here],
            [row["ratio"] for row in here],
            height=0.9,
            color=[WAYS[row["way"]][1] for row in here],
        )
        texts = [f"{row['ratio']:.2g}" for row in here]
        panel.bar_label(bars, texts, padding=3, fontsize=9, color=INK)
        panel.set_title(name.replace("+", " and "), fontsize=12, color=INK)
        panel.set_xlabel("speed, as a share of a float32 matrix product's", fontsize=10, color=INK)
        panel.margins(x=0.12, y=0.01)
        panel.grid(axis="x", color=GRID, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(labelsize=10, labelcolor=INK, length=0)
    middles = [sum(group) / len(group) for group in labels.values()]
    panels[0, 0].set_yticks(middles, list(labels))
    panels[0, 0].invert_yaxis()
    ways = list(dict.fromkeys(row["way"] for row in timed))
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in map(WAYS.__getitem__, ways)],
        loc="outside upper center",
        ncols=len(ways),
        frameon=False,
        fontsize=10,
    )
    threads = machine["threads"]
    figure.supxlabel(
        f"{machine['cpu']}, {threads} threads, PyTorch {machine['torch']}, " + ", ".join(dtypes),
        fontsize=9,
        color=INK,
    )
    figure.savefig(path, dpi=130)
