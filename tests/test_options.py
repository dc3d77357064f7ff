"""The options that have one value per axis: what users see of them is what the table says."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from natten._args import PART_OPTIONS, TILE_OPTIONS, WINDOW_OPTIONS, AxisOption, make_config

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    "natten": "torch",
    "natten.functional": "torch",
    "natten.distributed": "torch",
    "natten.jax": "jax",
    "natten.numpy": "numpy",
    "natten.flax.linen": "flax",
}
# Theirs are the signatures of NATTEN, or of projects that use it.
OF_NATTEN = re.compile(r"natten\dd|na\dd_qk_with_bias|neighborhood_attention_generic")
# Modules take None for dilation too, as NATTEN's do, and say it.
ALSO_NONE = re.compile(r"(NeighborhoodAttention\dD)\.dilation")


def of(option: AxisOption) -> str:
    return option.name


def functions(module_name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What a module makes public that has a window."""
    module = importlib.import_module(module_name)
    for name in module.__all__:
        function = getattr(module, name)
        if callable(function) and not OF_NATTEN.match(name):
            try:
                signature = inspect.signature(function)
            except ValueError:  # of something written in C
                continue
            if "kernel_size" in signature.parameters:
                yield name, function


@pytest.mark.parametrize("module", MODULES)
def test_signatures(module: str):
    if importlib.util.find_spec(MODULES[module]) is None:
        pytest.skip(f"needs {MODULES[module]}")
    found = list(functions(module))
    assert found
    for name, function in found:
        parameters = inspect.signature(function).parameters
        doc = inspect.getdoc(function) or ""
        for option in WINDOW_OPTIONS:
            where = f"{module}.{name}.{option.name}"
            assert option.name in parameters, f"{where}: missing"
            shown = parameters[option.name]
            default = inspect.Parameter.empty if option.default is None else option.default
            assert shown.default is default, f"{where}: has another default than the table"
            types = {option.type}
            if ALSO_NONE.search(where):
                types.add(f"{option.type} | None")
            assert shown.annotation in types, f"{where}: has another type than the table"
            # Others refer to those of this name.
            if re.fullmatch(r"na\dd", name) and module != "natten.numpy":
                assert option.name in doc, f"{where}: not in the documentation"
        if re.fullmatch(r"na\dd(_qk|_av)?|explain", name):
            for option in PART_OPTIONS:
                where = f"{module}.{name}.{option.name}"
                assert option.name in parameters, f"{where}: missing"
                assert parameters[option.name].default is option.default, where
                # Of JAX's offsets arrays are taken too.
                assert parameters[option.name].annotation.removeprefix("Offsets | ").removeprefix(
                    f"{option.type}"
                ) in ("", "None"), where


def test_order_of_the_wire():
    """C++ reads in the order of the table, into fields of the same names."""
    struct = re.search(
        r"struct Neighborhood \{(.*?)\n\};",
        (ROOT / "libnatten/include/natten/problem.h").read_text(),
        re.DOTALL,
    )
    assert struct is not None
    fields = re.findall(r"^  Tuple (\w+);", struct[1], re.MULTILINE)
    assert fields == [*map(of, WINDOW_OPTIONS), *map(of, PART_OPTIONS)]
    described = re.search(
        r"`config` holds (\d+) tuples.*?\((.*?)\)",
        (ROOT / "bindings/call.h").read_text(),
        re.DOTALL,
    )
    assert described is not None
    names = re.findall(r"\w+", described[2].replace("///", ""))
    assert names == [*fields, *map(of, TILE_OPTIONS)]
    assert int(described[1]) == len(names)
    read = re.search(
        r"for \(Tuple\* tuple : \{(.*?)\}\)", (ROOT / "bindings/call.cpp").read_text(), re.DOTALL
    )
    assert read is not None
    assert re.findall(r"&n\.(\w+)", read[1]) == fields


@pytest.mark.parametrize("option", WINDOW_OPTIONS, ids=of)
def test_documents(option: AxisOption):
    """Pages that describe windows describe each option."""
    for page in ("semantics.md", "choosing-a-window.md", "cpp.md"):
        assert option.name in (ROOT / "docs" / page).read_text(), page


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_defaults_said_are_defaults(rank: int):
    """A config is the same whether defaults are left out, passed, or passed per axis."""
    left_out = make_config(rank, 5)
    passed = {o.name: o.default for o in WINDOW_OPTIONS[1:]}
    assert make_config(rank, 5, **passed) == left_out
    for option in WINDOW_OPTIONS[1:]:
        per_axis = passed | {option.name: (option.default,) * rank}
        assert make_config(rank, (5,) * rank, **per_axis) == left_out
        assert make_config(rank, 5, **{o.name: None for o in PART_OPTIONS}) == left_out
    # What is not the default stays in its place, be it the first option or the last.
    for option in WINDOW_OPTIONS[1:]:
        other = {"dilation": 2, "is_causal": True, "stride": 3, "boundary": "cut"}[option.name]
        changed = make_config(rank, 5, **{option.name: other})
        place = WINDOW_OPTIONS.index(option) * (rank + 1)
        at = range(place + 1, place + 1 + rank)
        differ = [i for i, (a, b) in enumerate(zip(changed, left_out, strict=True)) if a != b]
        assert differ == list(at)
        assert all(changed[i] == option.encoded(other, rank)[0] for i in at)
