"""How calls of other NATTEN versions are taken: what comes by position, keywords, backends, names,
and the table of them in docs/migration.md. Files of another project in one folder with ours."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import logging
import math
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from test_context import default_switches  # noqa: E402

import natten  # noqa: E402
import natten.functional as F  # noqa: E402
from natten import _clash, _kernel, backends  # noqa: E402
from natten.token_permute import (  # noqa: E402
    token_permute_operation,
    token_unpermute_operation,
)

__all__ = ["default_switches"]  # a fixture of every test

ROOT = Path(__file__).resolve().parents[1]
X = {rank: torch.randn(1, *(6, 5, 4)[:rank], 2, 3) for rank in (1, 2, 3)}  # heads-last
UPSTREAM = {
    "attention_kwargs": {"backend": "flex-fmha"},
    "backward_use_pt_reduction": True,
    "run_persistent_kernel": False,
    "kernel_schedule": natten.types.KernelSchedule.WarpSpecializedPingpong,
    "torch_compile": True,
    "try_fuse_additional_kv": True,
    "xformers_kwargs": None,
}
ORDERS = r"\(kernel_size, dilation, is_causal\).*\(kernel_size, stride, dilation, is_causal\)"


# What comes by position.


def fused_functions(framework: str):
    """(function, its arguments up to kernel_size) of a framework."""
    if framework == "torch":
        for rank, x in X.items():
            yield from ((f, (x, x, x, 3)) for f in (
                getattr(F, f"na{rank}d"), F.neighborhood_attention_generic, natten.explain
            ))  # fmt: skip
        return
    module = importlib.import_module(f"natten.{framework}")
    for rank, x in X.items():
        yield getattr(module, f"na{rank}d"), (*[x.numpy()] * 3, 3)


def module_makers(kind: str):
    """Calls of the modules of a kind, with the same keywords always."""
    if kind == "torch":
        return [getattr(natten, f"NeighborhoodAttention{rank}D") for rank in (1, 2, 3)]
    linen = pytest.importorskip("natten.flax.linen")
    if kind == "linen":
        return [getattr(linen, f"NeighborhoodAttention{rank}D") for rank in (1, 2, 3)]
    from flax import nnx

    def make(cls):
        return lambda *args, **kwargs: cls(*args, rngs=nnx.Rngs(0), **kwargs)

    return [make(getattr(natten.flax, f"NeighborhoodAttention{rank}D")) for rank in (1, 2, 3)]


@pytest.mark.parametrize("framework", ["torch", "numpy", "jax"])
def test_functions_take_what_follows_kernel_size_by_name(framework):
    if framework == "jax":
        pytest.importorskip("jax")
    for function, args in fused_functions(framework):
        for more in ((1,), (2, 1), (1, 1, True), (None,)):
            message = rf"^{function.__name__}: got {len(more)} arguments? by position.*{ORDERS}"
            with pytest.raises(TypeError, match=message):
                function(*args, *more)
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert kinds[:4] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 4
        assert set(kinds[4:]) == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("kind", ["torch", "nnx", "linen"])
def test_modules_take_what_follows_kernel_size_by_name(kind):
    for make in module_makers(kind):
        for more in ((1,), (1, 1), (2, False, True)):
            message = rf"^NeighborhoodAttention.D: got {len(more)} arguments? by position.*{ORDERS}"
            with pytest.raises(TypeError, match=message):
                make(8, 2, 3, *more)
        by_name = make(embed_dim=8, num_heads=2, kernel_size=3, dilation=2)
        assert by_name.embed_dim == by_name.dim == 8
        assert make(8, 2, 3).embed_dim == make(dim=8, num_heads=2, kernel_size=3).dim == 8
        for args, more in (((8, 2, 3), {}), ((), dict(dim=8, num_heads=2, kernel_size=3))):
            with pytest.raises(TypeError, match=r"^embed_dim: got 16 besides dim, 8; "):
                make(*args, embed_dim=16, **more)
        with pytest.raises(TypeError, match=r"missing .*dim"):
            make(num_heads=2, kernel_size=3)


def test_unfused_functions_keep_their_order():
    for rank, x in X.items():
        x = x.movedim(-2, 1)
        qk, av = (getattr(F, f"na{rank}d_{name}") for name in ("qk", "av"))
        attn = qk(x, x, 3, 1, None, True)
        assert torch.equal(attn, qk(x, x, kernel_size=3, dilation=1, is_causal=True))
        weights = attn.softmax(-1)
        assert torch.equal(
            av(weights, x, 3, 1, None, True), av(weights, x, kernel_size=3, is_causal=True)
        )


# Keywords.


def calls_that_take_keywords():
    for rank, x in X.items():
        fused, qk, av = (getattr(F, f"na{rank}d{kind}") for kind in ("", "_qk", "_av"))
        generic, first = F.neighborhood_attention_generic, x.movedim(-2, 1)
        weights = torch.rand(*first.shape[:-1], 3**rank)
        yield lambda x=x, fused=fused, **more: fused(x, x, x, 3, **more)
        yield lambda x=x, generic=generic, **more: generic(x, x, x, 3, **more)
        yield lambda first=first, qk=qk, **more: qk(first, first, 3, **more)
        yield lambda w=weights, first=first, av=av, **more: av(w, first, 3, **more)
        yield lambda x=x, **more: natten.explain(x, x, x, 3, **more)
    yield lambda **more: natten.attention(X[1], X[1], X[1], **more)
    for rank in (1, 2, 3):
        yield functools.partial(getattr(natten, f"NeighborhoodAttention{rank}D"), 8, 2, 3)


def test_keywords_of_other_versions_have_no_effect():
    for call in calls_that_take_keywords():
        want, got = call(), call(**UPSTREAM)
        if isinstance(want, torch.Tensor):
            assert torch.equal(got, want)
        for name, value in UPSTREAM.items():
            call(**{name: value})
        for schedule in (None, "non", "coop", "pp"):
            call(kernel_schedule=schedule)
        with pytest.raises(TypeError, match=r"\(\) got an unexpected keyword argument 'sride'"):
            call(sride=1)
        with pytest.raises(ValueError, match="kernel_schedule: got 'fast'; must be None"):
            call(kernel_schedule="fast")
        with pytest.raises(TypeError, match=r"^attention_kwargs: got 3; must be a dictionary"):
            call(attention_kwargs=3)


def test_keywords_are_in_signatures():
    for function in (F.na1d, F.na2d_qk, F.na3d_av, natten.attention, natten.explain,
                     F.neighborhood_attention_generic, natten.NeighborhoodAttention1D):  # fmt: skip
        shown = inspect.signature(function).parameters
        for name in UPSTREAM:
            default = shown[name].default
            assert default is (True if name == "run_persistent_kernel" else default)
            assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert isinstance(shown[name].annotation, str)


def test_sizes_of_tiles_in_attention():
    x = X[1]
    sizes = dict.fromkeys(
        ("q_tile_size", "kv_tile_size", "backward_q_tile_size", "backward_kv_tile_size",
         "backward_kv_splits"), 64,
    )  # fmt: skip
    assert torch.equal(natten.attention(x, x, x, **sizes), natten.attention(x, x, x))
    for name in sizes:
        with pytest.raises(ValueError, match=name.replace("_size", "_shape")):
            natten.attention(x, x, x, **{name: 0})


def test_merge_takes_0_21s_keywords():
    x = X[1]
    parts = [natten.attention(x, x, x, return_lse=True) for _ in range(2)]
    outputs, lses = zip(*parts, strict=True)
    want = natten.merge_attentions(outputs, lses)
    for flags in itertools.product((True, False), repeat=2):
        options = dict(zip(("torch_compile", "use_autograd_fix"), flags, strict=True))
        got = natten.merge_attentions(outputs, lses, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Backends.

BACKENDS = [
    f"{kernels}-{operation}"
    for kernels in ("cutlass", "hopper", "blackwell", "flex")
    for operation in ("fna", "fmha")
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_of_other_versions_mean_fused(backend, caplog, monkeypatch):
    monkeypatch.setattr(_kernel, "_told", set())
    x = X[2]
    want = F.na2d(x, x, x, 3, backend="fused")
    with caplog.at_level(logging.INFO, "natten"):
        for _ in range(2):
            with natten.na_kernel("naive"):
                assert torch.equal(F.na2d(x, x, x, 3, backend=backend), want)
            with natten.na_kernel(backend):
                assert torch.equal(F.na2d(x, x, x, 3), want)
                # The innermost counts.
                naive = F.na2d(x, x, x, 3, backend="naive")
            assert torch.equal(naive, F.na2d(x, x, x, 3, backend="naive"))
            natten.attention(X[1], X[1], X[1], backend=backend)
    (told,) = (r.getMessage() for r in caplog.records)
    assert told == (
        f'backend "{backend}" is a name of NATTEN\'s kernels; it is taken as "fused", the fused '
        "backend of the device"
    )
    explanation = natten.explain(x, x, x, 3, backend=backend)
    chosen = {v.backend for v in explanation.verdicts if v.chosen}
    assert chosen == {
        v.backend for v in natten.explain(x, x, x, 3, backend="fused").verdicts if v.chosen
    }
    assert explanation.note == told and str(explanation).endswith(told)
    assert natten.explain(x, x, x, 3, backend="fused").note == ""


def test_backends_of_other_versions_in_other_frameworks(caplog, monkeypatch):
    import natten.numpy as na

    monkeypatch.setattr(_kernel, "_told", set())
    x = X[2].numpy()
    with caplog.at_level(logging.INFO, "natten"):
        assert (na.na2d(x, x, x, 3, backend="flex-fna") == na.na2d(x, x, x, 3)).all()
        nj = pytest.importorskip("natten.jax")
        assert (nj.na2d(x, x, x, 3, backend="hopper-fna") == nj.na2d(x, x, x, 3)).all()
    assert [r.getMessage().split('"')[1] for r in caplog.records] == ["flex-fna", "hopper-fna"]


@pytest.mark.long
def test_names_of_other_versions_in_graphs():
    module = natten.NeighborhoodAttention2D(embed_dim=6, num_heads=2, kernel_size=3, dilation=1)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            with natten.na_kernel("blackwell-fna"):
                y = F.na2d(x, x, x, kernel_size=3, backend="cutlass-fna", **UPSTREAM)
            z = F.neighborhood_attention_generic(x, y, x, 3, stride=2, torch_compile=False)
            return y + z + self.module(x.flatten(-2)).unflatten(-1, (2, 3))

    x, model = X[2], Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    refusing = torch.compile(lambda x: F.na2d(x, x, x, 3, 2), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="by position after kernel_size"):
        refusing(x)


# Shapes of tiles.


def config_functions():
    return {name: getattr(natten, name) for name in backends.__all__ if "configs_for" in name}


def test_configs_are_none_on_the_cpu():
    assert len(config_functions()) == 14
    for name, function in config_functions().items():
        assert function is getattr(backends, name)
        for x in (X[1],) if name.endswith("fmha") else X.values():
            assert function(x, x, x) == []
    for x in X.values():
        assert backends.get_compatible_backends(x, x, x, False) == ["vectorized"]
    assert backends.get_compatible_fmha_backends(X[1], X[1], X[1], True, False, False) == [
        "vectorized"
    ]
    assert backends.choose_backend(x, x, x, torch_compile=True) == "vectorized"
    assert backends.choose_fmha_backend(X[1], X[1], X[1], is_causal=True) == "vectorized"
    elsewhere = X[1].to("meta")
    for choose in (backends.choose_backend, backends.choose_fmha_backend):
        with pytest.raises(NotImplementedError, match="no backend runs these tensors; "):
            choose(elsewhere, elsewhere, elsewhere)
    assert natten.get_configs_for_flex_fna(elsewhere, elsewhere, elsewhere, True) == []
    assert natten.get_configs_for_flex_fmha(X[1], X[1], X[1], torch_compile=True) == []
    with pytest.raises(TypeError, match="key: got"):
        natten.get_configs_for_cutlass_fna(X[1], None, X[1])


def test_a_device_without_kernels(monkeypatch):
    monkeypatch.setattr(backends, "lacks_kernels", lambda device: device.type == "meta")
    x = X[1].to("meta")
    assert backends.get_compatible_backends(x, x, x) == ["composed"]
    assert backends.get_compatible_fmha_backends(x, x, x) == ["composed"]
    for function in config_functions().values():
        assert function(x, x, x) == []


@pytest.mark.parametrize("backward", [False, True])
def test_configs_are_what_the_backend_takes(backward, monkeypatch):
    """With a backend that takes tiles of 16 queries and 8 or 16 keys."""
    made = []
    monkeypatch.setattr(
        backends,
        "_config",
        lambda query, is_fmha, is_causal=False, **tiles: (query.dim() - 3, tiles),
    )

    def answers(is_backward, config, tensors):
        assert is_backward is backward
        rank, tiles = config
        made.append(tiles)
        refusal = ""
        for name, tile in tiles.items():
            assert name.startswith("backward_") is backward
            allowed = (16,) if "q_tile" in name else (8, 16)
            size = tile**rank if isinstance(tile, int) else math.prod(tile)
            refusal = "" if size in allowed else f"{name}: got {tile}"
        return {"busy": "not this one", "tiles": refusal, "plain": ""}

    monkeypatch.setattr(backends, "_answers", answers)
    sign = "bwd_" if backward else ""
    for rank, x in X.items():
        shapes = {
            bits: [
                tuple(1 << b for b in each)
                for each in itertools.product(range(bits + 1), repeat=rank)
                if sum(each) == bits
            ]
            for bits in (3, 4)
        }
        want = set(itertools.product(shapes[4], shapes[3] + shapes[4]))
        got = getattr(natten, f"get_{sign}configs_for_cutlass_fna")(x, x, x)
        assert len(got) == len(want) and set(got) == want
        hopper = getattr(natten, f"get_{sign}configs_for_cutlass_hopper_fna")(x, x, x)
        assert {config if backward else config[0] for config in hopper} == want
    got = getattr(natten, f"get_{sign}configs_for_cutlass_fmha")(X[1], X[1], X[1])
    assert sorted(got) == [(16, 8), (16, 16)]


# Tokens ordered by tiles.


def permuted_by_hand(x, tile, dilation, flip):
    """By the definition in the module's docstring, token by token."""
    batch, *grid, heads, dim = x.shape
    rank = len(grid)
    tiles = [-(-n // (t * d)) for n, t, d in zip(grid, tile, dilation, strict=True)]
    groups = math.prod(dilation)
    padded = [n * t for n, t in zip(tiles, tile, strict=True)]
    out = torch.zeros(batch * groups, math.prod(padded), heads, dim, dtype=x.dtype)

    def rank_of(index, sizes):
        place = 0
        for i in reversed(range(rank)) if flip else range(rank):
            place = place * sizes[i] + index[i]
        return place

    for token in itertools.product(*map(range, grid)):
        group = [i % d for i, d in zip(token, dilation, strict=True)]
        at = [i // d for i, d in zip(token, dilation, strict=True)]
        of_tile = rank_of([p // t for p, t in zip(at, tile, strict=True)], tiles)
        in_tile = rank_of([p % t for p, t in zip(at, tile, strict=True)], tile)
        row = of_tile * math.prod(tile) + in_tile
        for b in range(batch):
            out[b * groups + rank_of(group, dilation), row] = x[(b, *token)]
    return out, tuple(grid), tuple(padded)


def test_token_permutation():
    seed = int(os.environ.get("NATTEN_TEST_SEED", "0"))
    rng = random.Random(seed)
    for number in range(30):
        rank = 1 + number % 3
        grid = [rng.randint(1, 7) for _ in range(rank)]
        tile = tuple(rng.randint(1, 4) for _ in range(rank))
        dilation = tuple(rng.randint(1, 3) for _ in range(rank))
        flip = rng.random() < 0.5
        case = f"seed {seed}, case {number}: {grid}, {tile}, {dilation}, {flip}"
        x = torch.randn(2, *grid, 2, 3, dtype=torch.float64)
        x = x if number % 2 else x.transpose(-1, -2).contiguous().transpose(-1, -2)
        x.requires_grad_()
        permuted, layout, padded = token_permute_operation(x, tile, dilation, flip, use_torch=True)
        want = permuted_by_hand(x.detach(), tile, dilation, flip)
        assert torch.equal(permuted, want[0]), case
        assert (layout, padded) == want[1:], case
        back = token_unpermute_operation(permuted, layout, tile, dilation, flip, use_torch=False)
        assert torch.equal(back, x), case
        weights = torch.randn_like(permuted)
        (gradient,) = torch.autograd.grad((permuted * weights).sum(), x)
        want = token_unpermute_operation(weights, layout, tile, dilation, flip)
        assert torch.equal(gradient, want), case
    x = torch.randn(1, 2, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_permute_operation(x, (2, 1), (1, 2))[0], x)
    assert torch.autograd.gradcheck(
        lambda y: token_unpermute_operation(y, (2, 3), (2, 1), (1, 2)), y
    )
    assert token_permute_operation(x, 2)[1:] == ((2, 3), (2, 4))
    assert torch.equal(
        token_permute_operation(x, (2, 2))[0], token_permute_operation(x, 2, (1, 1), True)[0]
    )


def test_token_permutation_refuses():
    x = X[2]
    for arguments, kind, message in (
        ((x[0, 0], 2), ValueError, r"^tensor: got shape \[5, 2, 3\]; must be \[batch, \*spatial"),
        ((x, (2, 2, 2)), ValueError, "^tile_shape: got .*3 elements"),
        ((x, (2, 0)), ValueError, r"^tile_shape: got \[2, 0\]; must be positive"),
        ((x, 2, (1, -1)), ValueError, r"^dilation: got \[1, -1\]; must be positive"),
        ((x, 2.0), TypeError, "^tile_shape: got 2.0; must be an integer"),
        ((None, 2), TypeError, "^tensor: got"),
    ):
        with pytest.raises(kind, match=message):
            token_permute_operation(*arguments)
    permuted, grid, _ = token_permute_operation(x, 2, 2)
    for arguments, message in (
        ((x, grid, 2, 2), r"^tensor: got shape \[1, 6, 5, 2, 3\]; must be \[batch \* 4"),
        (
            (permuted[:3], grid, 2, 2),
            r"^tensor: got shape \[3, 16, 2, 3\]; must be \[batch \* 4, 16",
        ),
        ((permuted, grid, 2), r"^tensor: got shape .*must be \[batch \* 1, 36, heads"),
        ((permuted, (), 2), r"^token_layout_shape: got \[\]; must have"),
    ):
        with pytest.raises(ValueError, match=message):
            token_unpermute_operation(*arguments)


# Switches.


def test_flex_compile_switches(default_switches):
    def state():
        return natten.is_flex_compile_allowed(), natten.is_flex_compile_backprop_allowed()

    assert state() == (False, False)
    for call, want in (
        (lambda: natten.allow_flex_compile_backprop(), (False, False)),
        (lambda: natten.allow_flex_compile(), (True, False)),
        (lambda: natten.allow_flex_compile_backprop(), (True, True)),
        (lambda: natten.disable_flex_compile_backprop(), (True, False)),
        (lambda: natten.allow_flex_compile(True, True), (True, True)),
        (lambda: natten.disable_flex_compile(), (False, False)),
        (lambda: natten.allow_flex_compile(False, backprop=True), (False, False)),
    ):
        call()
        assert state() == want
    assert natten.HAS_LIBNATTEN is True


# The table of names.


def rows_of_names():
    page = (ROOT / "docs" / "migration.md").read_text()
    table = page.partition("### Every public name\n")[2].partition("\n## ")[0]
    for line in table.splitlines():
        if line.startswith("| ") and not line.startswith(("| in ", "| --- ")):
            versions, module, names, here = (cell.strip() for cell in line.strip("|").split("|"))
            every = []
            for name in re.findall(r"`(\w+)`", names):
                # `N` is the number of axes, where a word has it.
                numbered = re.sub(r"(?<=[a-z])N(?=d|D)|(?<=NATTEN)N(?=D)", "{}", name)
                every += [numbered.format(n) for n in (1, 2, 3)] if numbered != name else [name]
            yield versions, module.strip("`"), every, here


def exists(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def test_table_of_names():
    rows = list(rows_of_names())
    assert len(rows) > 30
    for versions, module, names, here in rows:
        assert versions and names, (module, names)
        is_gone = here.startswith("gone")
        assert is_gone or here.startswith("the same"), here
        for name in names:
            assert exists(module, name) is not is_gone, (module, name)
        for other in re.findall(r"(?<=in )`(natten[\w.]*)`(?= too)", here):
            assert all(exists(other, name) for name in names), (other, names)
        for path in re.findall(r"`(natten\.[\w.]+)`", here):
            *outer, last = path.split(".")
            assert exists(".".join(outer), last) or exists(path, "__name__"), path
    told = {(module, name) for _, module, names, _ in rows for name in names}
    # What these modules have for NATTEN's sake, which the table has to know.
    for module in ("natten.backends", "natten.modules", "natten.token_permute"):
        assert {(module, n) for n in importlib.import_module(module).__all__} <= told | {
            (module, n) for m, n in told if m == "natten" and "configs_for" in n
        }


# Files of the other project.


def installed_over(tmp_path, *foreign: str, record: str | None = None) -> Path:
    """This package, as links to its files, in one folder with others."""
    package = tmp_path / "natten"
    package.mkdir()
    for file in Path(natten.__path__[0]).iterdir():
        if file.name != "__pycache__":
            (package / file.name).symlink_to(file)
    for name in foreign:
        (package / name).touch()
    if record is not None:
        info = tmp_path / "natten-0.21.6+torch290cu130.dist-info"
        info.mkdir()
        (info / "RECORD").write_text(record)
    return package


@pytest.mark.parametrize(
    ("foreign", "record", "found"),
    [
        ((), None, []),
        (("libnatten.cpython-312-x86_64-linux-gnu.so",), None, ["libnatten.cpython"]),
        (("_C.cpython-39-x86_64-linux-gnu.so", "na2d.py"), None, ["_C.cpython", "na2d.py"]),
        ((), "natten/__init__.py,,\nnatten/context.py,,\n", ["natten-0.21.6+torch"]),
        # An older version of this project, and an editable install of anything.
        ((), "natten/__init__.py,,\nnatten/_core.abi3.so,,\n", []),
        ((), "__editable__.natten.pth,,\n", []),
    ],
)
def test_files_of_the_other_project(tmp_path, foreign, record, found):
    package = installed_over(tmp_path, *foreign, record=record)
    files = _clash.foreign_files(str(package), natten.__version__)
    assert len(files) == len(found)
    for path, part in zip(files, found, strict=True):
        assert part in path and os.path.exists(path)
    if found:
        with pytest.warns(RuntimeWarning, match=r"over another project's .*pip uninstall natten"):
            _clash.warn_of_clash(str(package), natten.__version__)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _clash.warn_of_clash(str(package), natten.__version__)


def test_import_warns_of_the_other_project(tmp_path):
    installed_over(tmp_path, "libnatten.so")
    result = subprocess.run(
        [sys.executable, "-c", "import natten; print(natten.__path__)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in result.stdout
    assert "RuntimeWarning: natten" in result.stderr and "libnatten.so" in result.stderr


def test_this_package_has_none_of_these_names():
    assert _clash.foreign_files(natten.__path__[0], natten.__version__) == []
