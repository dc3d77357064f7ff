"""Names that JAX and PyTorch do not promise to keep: each is there, and used by one file only."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import natten

PACKAGE = Path(natten.__file__).parent
PRIVATE = {name: PACKAGE / name / "_private.py" for name in ("jax", "torch")}
FRAMEWORKS = pytest.mark.parametrize("framework", PRIVATE)

# Parts of JAX that are documented as such that may change at any time.
UNSTABLE = ("jax.interpreters", "jax.extend", "jax.experimental")


def names_of_framework(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that some source takes from JAX or PyTorch."""
    tree = ast.parse(source)
    aliases = {}  # what a name in this file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            roots = [(a.asname or a.name, a.name) for a in node.names]
            found = {a.split(".")[0]: name if a != name else a.split(".")[0] for a, name in roots}
            yield from (
                (node.lineno, name) for _, name in roots if name.startswith(("jax", "torch"))
            )
        else:
            continue
        found = {a: name for a, name in found.items() if name.split(".")[0] in PRIVATE}
        aliases |= found
        yield from ((node.lineno, name) for name in found.values())
    for node in ast.walk(tree):
        parts: list[str] = []
        line = getattr(node, "lineno", 0)
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in aliases:
            yield line, ".".join([aliases[node.id], *parts])


def is_private(name: str) -> bool:
    return name.startswith(UNSTABLE) or any(
        part.startswith("_") and not part.startswith("__") for part in name.split(".")
    )


def is_gone(name: str) -> bool:
    module, *rest = name.split(".")
    found = importlib.import_module(module)
    for part in rest:
        module += f".{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(module)
            except ImportError:
                return True
        found = getattr(found, part)
    return False


@FRAMEWORKS
def test_private_names_are_there(framework):
    pytest.importorskip(framework)
    names = {n for _, n in names_of_framework(PRIVATE[framework].read_text()) if is_private(n)}
    assert len(names) > 10
    missing = sorted(filter(is_gone, names))
    version = importlib.metadata.version(framework)
    assert not missing, f"natten/{framework}/_private.py: {framework} {version} lacks {missing}"


def test_a_name_that_is_gone_is_named():
    pytest.importorskip("jax")
    source = """
import jax
from jax.interpreters.ad import Zero, no_such_rule
from jax._src import no_such_module as x
jax._src.dispatch.no_such_set.add(jax.numpy.sum)
"""
    names = [name for _, name in names_of_framework(source) if is_private(name)]
    assert sorted(filter(is_gone, names)) == [
        "jax._src.dispatch.no_such_set",
        "jax._src.dispatch.no_such_set.add",
        "jax._src.no_such_module",
        "jax.interpreters.ad.no_such_rule",
    ]


def test_private_names_are_used_by_one_file_only():
    used = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in PRIVATE.values()
        for line, name in names_of_framework(path.read_text())
        if is_private(name)
    ]
    assert not used, f"natten/*/_private.py is the place for {used}"


def test_attributes_of_what_jax_hands_over(monkeypatch):
    """Inside `shard_map`: which axes an array varies along, and which axes are mapped."""
    jax = pytest.importorskip("jax")
    if not hasattr(jax, "shard_map"):
        pytest.skip("needs jax.shard_map")
    import natten.jax
    from natten.jax import _partitioning, _private

    seen = []

    def recorded(function, *args):
        seen.append(function(*args))
        return seen[-1]

    for name in ("varying_axes", "mapped_axes"):
        function = functools.partial(recorded, getattr(_private, name))
        monkeypatch.setattr(_partitioning, name, function)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    x = jax.numpy.ones((1, 5, 1, 2))
    f = jax.shard_map(
        lambda x: natten.jax.na1d(x, x, x, 3), mesh=mesh, in_specs=spec, out_specs=spec
    )
    jax.jit(f)(x)
    assert seen == [{"data"}] * 3 + [({"data"}, ("data",))]
    assert jax.typeof(_private.made_varying(x, ())) == jax.typeof(x)
