"""Properties of the window, as Python sees it, against the oracle's literal listing."""

from __future__ import annotations

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natten import _core


@st.composite
def axes(draw):
    """(length, kernel_size, stride, dilation, is_causal) of one axis."""
    length = draw(st.integers(1, 60))
    k = draw(st.integers(1, length))
    return (
        length,
        k,
        draw(st.integers(1, k)),
        draw(st.integers(1, length // k)),
        draw(st.booleans()),
    )


def windows(length, k, s, d, causal, inverse=False):
    return [_core.window(inverse, i, length, k, s, d, causal) for i in range(length)]


@settings(max_examples=500, deadline=None)
@given(axes())
def test_window_is_the_definition(axis):
    assert windows(*axis) == oracle.axis_windows(*axis)


@settings(max_examples=300, deadline=None)
@given(axes())
def test_inverse_window_lists_who_sees_a_key(axis):
    seen = windows(*axis)
    for key, queries in enumerate(windows(*axis, inverse=True)):
        assert queries == [q for q, keys in enumerate(seen) if key in keys]


@settings(max_examples=300, deadline=None)
@given(axes())
def test_window_invariants(axis):
    length, k, _, d, causal = axis
    for query, keys in enumerate(windows(*axis)):
        assert all(0 <= key < length and key % d == query % d for key in keys)
        assert 1 <= len(keys) <= k
        assert len(keys) == k or causal
        if causal:
            assert keys[-1] == query
        else:
            assert query in keys


def test_special_windows():
    assert windows(6, 6, 1, 1, False) == [list(range(6))] * 6  # self attention
    blocks = [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
    assert windows(6, 3, 3, 1, False) == blocks  # blocked attention
    assert windows(5, 4, 1, 1, False)[2] == [0, 1, 2, 3]  # even: one further to the left


def test_window_refuses():
    with pytest.raises(ValueError, match="kernel_size"):
        _core.window(False, 0, 5, 6)
    with pytest.raises(ValueError, match=r"token: got 5; must lie in \[0, 5\)"):
        _core.window(False, 5, 5, 3)
