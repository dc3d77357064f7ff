"""Published snippets run as they were written: NATTEN's front-end page, PyTorch's tutorial."""

from __future__ import annotations

import importlib.util
import random
import re
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from test_context import default_switches  # noqa: E402

import natten  # noqa: E402
import natten.functional as F  # noqa: E402

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "tests" / "seeds" / "frontend.md"
FENCES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)

__all__ = ["default_switches"]  # a fixture of every test: what a snippet switches is undone


def snippet_name(fence: str) -> str:
    """The first line that tells the snippet from others."""
    lines = [line for line in fence.splitlines() if line != "from natten import ("]
    return re.sub(r"\W+", " ", lines[0]).strip()


def run(fence: str) -> dict:
    """Runs a snippet where the names are defined that it takes for granted. Returns all names."""
    torch.manual_seed(0)
    heads, dim = 2, 4

    def randn(*grid: int) -> torch.Tensor:
        """Heads-first where the snippet uses unfused operations."""
        first = "_qk" in fence
        return torch.randn(1, heads, *grid, dim) if first else torch.randn(1, *grid, heads, dim)

    # The smallest grids on which kernel_size 7, dilation 4 fits; a small one for the unfused 3-D
    # snippet, which has kernel_size (7, 9, 9).
    grids = {1: (28,), 2: (28, 29), 3: (7, 9, 10) if "_qk" in fence else (28, 28, 28)}
    names: dict = {
        f"{name}_{rank}d": randn(*grid)
        for rank, grid in grids.items()
        for name in ("query", "key", "value")
    }
    names |= {name: randn(7, 9) for name in ("q", "q_1", "k", "v")}
    names |= {
        "rpb_2d": torch.randn(heads, 13, 13),
        "attn_scale": dim**-0.5,
        "attn_scale_sqrt": dim**-0.25,
        "model": natten.NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3),
        "input": torch.randn(1, 5, 6, 8),
        # Imported by snippets further up the page.
        "NeighborhoodAttention3D": natten.NeighborhoodAttention3D,
        "na2d": F.na2d,
        "na3d": F.na3d,
    }
    exec(compile(fence, PAGE.name, "exec"), names)
    return names


def test_page_is_whole():
    assert len(FENCES) == 25
    assert sum("is_casual" in fence for fence in FENCES) == 3


@pytest.mark.parametrize("fence", FENCES, ids=snippet_name)
def test_snippet_runs(fence):
    if "natten.flops" in fence and importlib.util.find_spec("fvcore") is None:
        pytest.skip("needs fvcore")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = run(fence)
    told = [str(warning.message) for warning in caught if "is_casual" in str(warning.message)]
    assert len(told) == fence.count("is_casual")
    assert all("misspelling of is_causal" in message for message in told)

    # The misspelling means what it should.
    for name, value in run(fence.replace("is_casual", "is_causal")).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(made[name], value)
            assert value.isfinite().all()


def snippet(part: str) -> str:
    """The only snippet that contains `part`."""
    (fence,) = (fence for fence in FENCES if part in fence)
    return fence


def test_snippet_modules_map_to_the_same_shape():
    made = run(snippet("na3d = Neigh"))
    for name, shape in (("na1d", (14,)), ("na2d", (14, 15)), ("na3d", (14, 14, 14))):
        x = torch.randn(1, *shape, 128)
        assert made[name](x).shape == x.shape
    video = run(snippet("na3d_video"))["na3d_video"]
    biased = run(snippet("rel_pos_bias"))["na3d_with_bias"]
    x = torch.randn(1, 7, 9, 10, 128)
    assert video(x).shape == biased(x).shape == x.shape
    assert biased.rpb.shape == (4, 13, 17, 17)


def test_snippet_scales_agree():
    """Scaling queries, scaling queries and keys, and the default scale are the same."""
    made = run(snippet("attn_scale_sqrt"))
    torch.testing.assert_close(made["o_1"], made["o_2"])
    scaled = snippet("attn_scale_sqrt").replace("  q_1, k, v,\n", "  q, k, v,\n", 1)
    torch.testing.assert_close(run(scaled)["o"], made["o_1"])


def test_snippet_counts_flops():
    pytest.importorskip("fvcore")
    flops = run(snippet("import get_flops"))["flops"]
    linear, attention = 30 * 8 * 4 * 8, 30 * 2 * 9 * 2 * 4
    assert flops == linear + attention
    assert run(snippet("import add_natten_handle"))["flop_ctr"].total() == flops


# PyTorch's tutorial on scaled dot product attention, restored as examples/sdpa_tutorial.py.


@pytest.fixture(scope="module")
def tutorial():
    spec = importlib.util.spec_from_file_location(
        "sdpa_tutorial", ROOT / "examples" / "sdpa_tutorial.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tutorial_runs(tutorial, capsys):
    sizes = ["--batch-size=2", "--length=24", "--num-heads=2", "--head-dim=4", "--steps=2"]
    tutorial.main([*sizes, "--compile-backend=aot_eager"])
    printed = capsys.readouterr().out
    for what in (
        "default implementation",
        *(f"{name} implementation" for name in tutorial.IMPLEMENTATIONS),
        "nested batch",
        "dense batch",
        "non-compiled module",
        "compiled module",
    ):
        assert re.search(rf"^{what}: [\d.]+ microseconds$", printed, re.MULTILINE), what
    assert "CausalSelfAttention(" in printed
    assert printed.count("Self CPU time total") == 2  # profiles


def test_tutorial_module(tutorial):
    """The module computes what PyTorch's attention does with its weights."""
    torch.manual_seed(0)
    model = tutorial.CausalSelfAttention(2, 8).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    qkv = model.c_attn(x).view(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    want = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    want = model.c_proj(want.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(model(x), want)
    with pytest.raises(ValueError, match="num_heads: got 3"):
        tutorial.CausalSelfAttention(3, 8)


def test_tutorial_nested_batch(tutorial):
    """Sequences of a nested batch come out as they do one by one."""
    random.seed(0)
    model = tutorial.CausalSelfAttention(2, 8)
    nested = tutorial.generate_rand_batch(4, 20, 8, pad_percentage=0.5)
    lengths = [len(sequence) for sequence in nested.unbind()]
    assert max(lengths) == 20 and len(set(lengths)) > 1
    with torch.no_grad():
        for output, sequence in zip(model(nested).unbind(), nested.unbind(), strict=True):
            torch.testing.assert_close(output, model(sequence[None])[0])
    assert tutorial.generate_rand_batch(4, 20, 8).shape == (4, 20, 8)
