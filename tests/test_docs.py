"""The Python examples of the README and the docs run as they stand, page by page."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, monkeypatch, tmp_path):
    examples = FENCE.findall(page.read_text())
    if not examples:
        pytest.skip("no Python examples on this page")
    needed = set(re.findall(r"\b(torch|jax|flax|optax|fvcore)\b", "".join(examples)))
    for framework in sorted(needed):
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"needs {framework}")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for number, example in enumerate(examples):
        exec(compile(example, f"{page.name}, example {number + 1}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
