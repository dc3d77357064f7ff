"""Properties of the window, as Python sees it, against the oracle's literal listing."""

from __future__ import annotations

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natten import _core
from natten._args import BOUNDARIES, make_config


@st.composite
def axes(draw):
    """(length, kernel_size, stride, dilation, is_causal, boundary) of one axis."""
    length = draw(st.integers(1, 60))
    boundary = draw(st.sampled_from(BOUNDARIES))
    is_cut = boundary == "cut"
    k = draw(st.integers(1, length + 5 * is_cut))
    dilations = range(1, (length + 3 if is_cut else length // k) + 1)
    strides = range(1, k + 1)
    if boundary == "circular":
        dilations = [d for d in dilations if length % d == 0]
    d = draw(st.sampled_from(dilations))
    if boundary == "circular":
        strides = [s for s in strides if length // d % s == 0]
    is_causal = boundary != "circular" and draw(st.booleans())
    return length, k, draw(st.sampled_from(strides)), d, is_causal, boundary


@st.composite
def parts(draw):
    """(offset, number) of the queries of a part of an axis, and the axis."""
    axis = draw(axes())
    offset = draw(st.integers(0, axis[0] - 1))
    return offset, draw(st.integers(1, axis[0] - offset)), axis


def windows(length, k, s, d, causal, boundary="shift", inverse=False):
    number = BOUNDARIES.index(boundary)
    return [_core.window(inverse, i, length, k, s, d, causal, number) for i in range(length)]


@settings(max_examples=500, deadline=None)
@given(axes())
def test_window_is_the_definition(axis):
    assert windows(*axis) == oracle.axis_windows(*axis)


@settings(max_examples=300, deadline=None)
@given(axes())
def test_inverse_window_lists_who_sees_a_key(axis):
    seen = windows(*axis)
    for key, queries in enumerate(windows(*axis, inverse=True)):
        # On a circular axis the interval of queries may begin anywhere.
        assert sorted(queries) == [q for q, keys in enumerate(seen) if key in keys]


@settings(max_examples=300, deadline=None)
@given(axes())
def test_window_invariants(axis):
    length, k, _, d, causal, boundary = axis
    for query, keys in enumerate(windows(*axis)):
        assert all(0 <= key < length and key % d == query % d for key in keys)
        assert len(keys) == len(set(keys))
        assert 1 <= len(keys) <= k
        assert len(keys) == k or causal or boundary == "cut"
        if causal:
            assert keys[-1] == query
        else:
            assert query in keys


@settings(max_examples=500, deadline=None)
@given(parts())
def test_key_range_is_what_the_windows_of_a_part_hold(part):
    offset, count, axis = part
    length, k, s, d, causal, boundary = axis
    config = make_config(1, k, d, causal, s, boundary, query_offset=offset, grid_size=length)
    ((begin, end),) = _core.key_range(config, [count])
    assert (begin, end) == oracle.axis_key_range(offset, count, *axis)
    assert begin <= offset or (begin, end) == (0, length)
    assert end - begin <= length
    assert boundary == "circular" or (begin >= 0 and end <= length)


def test_special_windows():
    assert windows(6, 6, 1, 1, False) == [list(range(6))] * 6  # self attention
    blocks = [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
    assert windows(6, 3, 3, 1, False) == blocks  # blocked attention
    assert windows(5, 4, 1, 1, False)[2] == [0, 1, 2, 3]  # even: one further to the left
    assert windows(5, 3, 1, 1, False, "cut")[::4] == [[0, 1], [3, 4]]
    assert windows(5, 3, 1, 1, False, "circular")[::4] == [[4, 0, 1], [3, 4, 0]]
    assert windows(2, 9, 1, 1, False, "cut") == [[0, 1]] * 2  # a window larger than the axis


def test_window_refuses():
    with pytest.raises(ValueError, match="kernel_size"):
        _core.window(False, 0, 5, 6)
    with pytest.raises(ValueError, match=r"token: got 5; must lie in \[0, 5\)"):
        _core.window(False, 5, 5, 3)
