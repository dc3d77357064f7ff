"""Predictions: what is counted, the published figures that they reproduce, meshes, the command."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import sys

import numpy as np
import oracle
import pytest

import natten
from natten import _calibration, simulator
from natten._simulate import GPUS, make_layer

SEED = int(os.environ.get("NATTEN_TEST_SEED", "0"))
FLUX = dict(input_size=(256, 256), kernel_size=80, heads=24)
HUNYUAN = dict(input_size=(30, 48, 80), kernel_size=(18, 24, 24), heads=24)


@pytest.fixture
def prices(monkeypatch):
    """A processor on which only multiply-adds take time."""

    def measured(dtype, op):
        names = (
            ("forward",)
            if op.endswith("forward")
            else ("backward", "backward_query", "backward_key")
        )
        row = tuple(1e-9 if name == "executed" else 0.0 for name in _calibration.COUNTS)
        return _calibration.Prices(dict.fromkeys(names, row), natten._core.num_threads())

    _calibration._prices.cache_clear()
    monkeypatch.delenv("NATTEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(_calibration, "_measure", measured)
    yield measured
    _calibration._prices.cache_clear()


def random_problem(rng: random.Random) -> dict:
    rank = rng.randint(1, 3)
    grid, window = (
        [],
        {name: [] for name in ("kernel_size", "stride", "dilation", "is_causal", "boundary")},
    )
    for _ in range(rank):
        boundary = rng.choice(("shift", "cut", "circular"))
        d, k = rng.randint(1, 3), rng.randint(1, 6)
        s = rng.randint(1, k)
        n = math.ceil((k + rng.randint(0, 9)) / s) * s
        grid.append(n * d)
        values = (k, s, d, boundary != "circular" and rng.random() < 0.3, boundary)
        for name, value in zip(window, values, strict=True):
            window[name].append(value)
    return {"input_size": tuple(grid), **{name: tuple(values) for name, values in window.items()}}


def windows_of(problem: dict) -> list[list[list[int]]]:
    """By axis and query, from the definition."""
    return [
        oracle.axis_windows(length, k, s, d, causal, boundary)
        for length, k, s, d, causal, boundary in zip(*problem.values(), strict=True)
    ]


def test_useful_work_is_that_of_the_definition(prices):
    rng = random.Random(SEED)
    for number in range(20):
        problem = random_problem(rng)
        pairs = math.prod(sum(map(len, axis)) for axis in windows_of(problem))
        for device, dtype in (("cpu", "float32"), ("h100", "float16"), ("a100", "float32")):
            case = f"seed {SEED}, problem {number}: {problem}, {device}"
            s = natten.simulate(
                **problem, batch=2, heads=3, head_dim=8, value_dim=5, dtype=dtype, device=device,
                backward=True,
            )  # fmt: skip
            assert s.useful_flops == 2 * 6 * pairs * ((8 + 5) + (3 * 8 + 2 * 5)), case
            assert s.executed_flops >= s.useful_flops, case
            assert s.seconds == pytest.approx(sum(p.seconds for p in s.passes)), case
            assert s.seconds > 0 and s.tiles > 0 and s.bytes > 0, case
            assert all(0 <= p.masked <= 1 for p in s.passes), case


# Milliseconds of the kernel and in all of NATTEN's own kernels, float16, head dim 128, as NATTEN
# publishes them, with its tiles of queries and keys; and what it executes to what is useful.
PUBLISHED = [
    ("h100", dict(input_size=32768, kernel_size=2048), 128, 128, 0.094848, None, 1.06),
    ("h100", dict(input_size=32768, kernel_size=2048, stride=256), 128, 128, 0.062687, None, 1.0),
    ("h100", dict(input_size=32768, kernel_size=2048, stride=2048), 128, 128, 0.059264, None, 1.0),
    ("h100", FLUX, (16, 8), (16, 8), 16.201, 18.603, 1.36),
    ("h100", dict(FLUX, stride=16), (16, 8), (16, 8), 7.914, 10.601, 1.0),
    ("h100", HUNYUAN, (2, 8, 8), (2, 8, 8), 79.043, 84.417, 2.04),
    ("h100", dict(HUNYUAN, stride=(16, 8, 8)), (2, 8, 8), (2, 8, 8), 23.359, 29.109, 1.0),
    ("b200", dict(input_size=32768, kernel_size=2048), 256, 128, 0.058111, None, None),
    ("b200", dict(input_size=32768, kernel_size=2048, stride=256), 256, 128, 0.037888, None, None),
    ("b200", dict(input_size=32768, kernel_size=2048, stride=2048), 256, 128, 0.03824, None, None),
    ("b200", FLUX, (16, 16), (16, 8), 8.692, 10.931, None),
    ("b200", dict(FLUX, stride=16), (16, 16), (16, 8), 4.114, 6.389, None),
    ("b200", HUNYUAN, (4, 8, 8), (2, 8, 8), 42.243, 47.353, None),
    ("b200", dict(HUNYUAN, stride=(16, 8, 8)), (4, 8, 8), (2, 8, 8), 13.01, 18.538, None),
]


@pytest.mark.parametrize(("device", "problem", "q", "kv", "kernel", "total", "ratio"), PUBLISHED)
def test_published_figures(device, problem, q, kv, kernel, total, ratio):
    s = natten.simulate(
        **problem, head_dim=128, dtype="float16", device=device, q_tile_shape=q, kv_tile_shape=kv,
        fixed_tiles=True,
    )  # fmt: skip
    assert 1e3 * s.passes[0].seconds == pytest.approx(kernel, rel=0.15)
    assert 1e3 * s.seconds == pytest.approx(total or kernel, rel=0.15)
    if ratio is not None:
        assert s.executed_flops / s.useful_flops == pytest.approx(ratio, abs=0.01)


def test_tiles_that_begin_anywhere_save_work():
    for problem in (FLUX, HUNYUAN):
        layer = dict(**problem, head_dim=128, dtype="float16", device="h100")
        tile = (16, 8) if problem is FLUX else (2, 8, 8)
        fixed = natten.simulate(**layer, q_tile_shape=tile, kv_tile_shape=tile, fixed_tiles=True)
        assert natten.simulate(**layer).executed_flops < 0.9 * fixed.executed_flops


def test_meshes(prices):
    """A device receives the keys that its queries see, and has not."""
    rng = random.Random(SEED + 1)
    for number in range(12):
        problem = random_problem(rng)
        grid = problem["input_size"]
        mesh = tuple(rng.randint(1, min(3, n)) for n in grid)
        case = f"seed {SEED}, problem {number}: {problem}, {mesh}"
        along = []
        for axis, (length, devices) in enumerate(zip(grid, mesh, strict=True)):
            window = [problem[name][axis] for name in list(problem)[1:]]
            share = math.ceil(length / devices)
            parts = [(first, min(share, length - first)) for first in range(0, length, share)]
            ranges = [oracle.axis_key_range(*part, length, *window) for part in parts]
            along.append(
                [(own, end - begin) for (_, own), (begin, end) in zip(parts, ranges, strict=True)]
            )
        halos = [
            math.prod(need for _, need in part) - math.prod(own for own, _ in part)
            for part in itertools.product(*along)
        ]
        of_token = 3 * (8 + 8) * 4
        s = natten.simulate(**problem, heads=3, head_dim=8, mesh=mesh)
        assert s.devices == math.prod(mesh), case
        assert s.halo_bytes == max(halos) * of_token, case
        assert s.total_halo_bytes == sum(halos) * of_token, case
        whole = natten.simulate(**problem, heads=3, head_dim=8)
        assert s.useful_flops <= whole.useful_flops, case
        if math.prod(mesh) == 1:
            assert s.halo_bytes == 0 and s.useful_flops == whole.useful_flops, case
        there_and_back = natten.simulate(
            **problem, heads=3, head_dim=8, mesh=mesh, backward=True, link=1e9, latency=1e-4
        )
        seconds = 2 * s.halo_bytes / 1e9 + (2e-4 if s.halo_bytes else 0)
        assert there_and_back.exchange_seconds == pytest.approx(seconds), case


def test_meshes_send_what_halo_bytes_says(prices):
    pytest.importorskip("torch")
    from natten.distributed import halo_bytes

    rng = random.Random(SEED + 2)
    crossed = 0.0
    for number in range(20):
        problem = random_problem(rng)
        mesh = tuple(rng.randint(1, min(4, n)) for n in problem["input_size"])
        s = natten.simulate(**problem, batch=2, heads=3, head_dim=8, value_dim=5, mesh=mesh)
        _, kernel_size, *_ = problem.values()
        window = {k: v for k, v in problem.items() if k not in ("input_size", "kernel_size")}
        of_parts = [
            halo_bytes(
                problem["input_size"], mesh, kernel_size, part=part,
                token_bytes=2 * 3 * (8 + 5) * 4, **window,
            )
            for part in itertools.product(*map(range, mesh))
        ]  # fmt: skip
        case = f"seed {SEED}, problem {number}: {problem}, {mesh}"
        assert s.halo_bytes == max(b.received for b in of_parts), case
        assert s.total_halo_bytes == sum(b.received for b in of_parts), case
        assert s.total_halo_bytes == sum(b.sent for b in of_parts), case
        crossed += s.total_halo_bytes
    assert crossed > 0


def test_prices_are_fitted():
    rng = np.random.default_rng(SEED)
    for number in range(20):
        rows = rng.random((30, 6)) * 10.0 ** rng.integers(-3, 9, 6)
        prices = np.where(rng.random(6) < 0.4, 0, rng.random(6)) / rows.mean(0)
        prices[0] = 1 / rows[:, 0].mean()
        seconds = rows @ prices * (1 + 0.01 * rng.standard_normal(30))
        found = _calibration.fit(rows, seconds)
        assert (found >= 0).all(), f"seed {SEED}, problem {number}"
        a = rows / seconds[:, None]
        slope = (a.T @ (1 - a @ found)) / np.sqrt((a * a).sum(0))  # where the optimum is, 0 or less
        assert (slope < 1e-6).all() and (np.abs(slope[found > 0]) < 1e-6).all(), (SEED, number)


def test_calibration_is_kept(monkeypatch, tmp_path):
    """In a file, if a folder is set; what is torn or tells of another machine is measured again."""
    monkeypatch.setattr(_calibration, "PROBLEMS", 14)
    monkeypatch.setattr(_calibration, "TURNS", 1)
    monkeypatch.setattr(_calibration, "SECONDS", 0.5)
    monkeypatch.setenv("NATTEN_CACHE_DIR", str(tmp_path / "cache"))
    measured = []
    measure = _calibration._measure
    monkeypatch.setattr(_calibration, "_measure", lambda *a: measured.append(a) or measure(*a))

    def predict():
        _calibration._prices.cache_clear()
        return natten.simulate((12, 12), 3, dtype="float16").seconds

    first = predict()
    (file,) = (tmp_path / "cache").iterdir()
    assert first > 0 and predict() == first and len(measured) == 1
    natten.simulate((12, 12), 3, dtype="bfloat16")
    assert len(measured) == 1  # what float16 costs
    held = json.loads(file.read_text())
    for text in ("", "{}", "[1]", file.read_text()[:-9], json.dumps({**held, "identity": {}}),
                 json.dumps({**held, "prices": {"forward": [1.0]}})):  # fmt: skip
        before = len(measured)
        file.write_text(text)
        predict()
        assert len(measured) == before + 1, text
    monkeypatch.setenv("NATTEN_CACHE_DIR", str(file))  # no folder: nothing is kept
    predict()
    _calibration._prices.cache_clear()


def test_refuses(prices):
    def refuses(message, *args, kind=ValueError, **kwargs):
        with pytest.raises(kind, match=message):
            natten.simulate(*args, **kwargs)

    refuses("^device: got 'tpu'", 8, 3, device="tpu")
    refuses("^dtype: got 'int8'", 8, 3, dtype="int8")
    refuses("^input_size: got", (8, 8, 8, 8), 3)
    refuses("^kernel_size: got", 8, 9)
    refuses("^stride: got", 8, 3, stride=4)
    refuses("are for GPUs", 8, 3, q_tile_shape=64)
    refuses("^fixed_tiles: needs", 8, 3, fixed_tiles=True, device="h100", dtype="float16")
    refuses("supported are", 80, 3, q_tile_shape=48, device="h100", dtype="float16",
            kind=NotImplementedError)  # fmt: skip
    refuses("float64", 8, 3, device="h100", dtype="float64", kind=NotImplementedError)
    refuses("^heads: got 0", 8, 3, heads=0)
    refuses("^mesh: got 0", 8, 3, mesh=0)
    refuses("^link: got 0", 8, 3, mesh=2, link=0)
    refuses("^latency: got -1", 8, 3, mesh=2, latency=-1)
    with pytest.raises(ValueError, match=r"^sweep: got 'heads'"):
        simulator.sweep("heads", input_size=8, kernel_size=3)


def test_prints_a_prediction():
    text = str(natten.simulate((64, 64), 7, heads=8, dtype="float16", device="h100", mesh=(2, 2)))
    assert text.startswith("predicted") and "data sheet" in text and "halo" in text
    assert all(gpu.source for gpu in GPUS.values())


def test_command(prices, tmp_path, capsys):
    layer = ["-i", "24", "32", "-w", "5", "7", "-n", "2", "-d", "16"]
    assert simulator.main(layer) == 0
    assert "this CPU" in capsys.readouterr().out
    file = tmp_path / "figures.json"
    for what, least in (("stride", 4), ("kernel", 5), ("dilation", 3)):
        assert simulator.main([*layer, "--sweep", what, "--json", str(file)]) == 0
        rows = json.loads(file.read_text())["rows"]
        assert len(rows) >= least and all(row["seconds"] > 0 for row in rows)
        assert "Predictions" in capsys.readouterr().out
    on_gpu = [*layer, "--dtype", "fp16", "--device", "h100"]
    assert simulator.main([*on_gpu, "--sweep", "tiles", "--json", str(file)]) == 0
    times = [row["seconds"] for row in json.loads(file.read_text())["rows"]]
    assert times == sorted(times) and len(times) > 20
    # A circular axis takes some strides only; the others say why.
    capsys.readouterr()
    assert simulator.main([*layer, "--boundary", "shift", "circular", "--sweep", "stride"]) == 0
    assert "must" in capsys.readouterr().out
    assert simulator.main([*layer, "-s", "9"]) == 1
    assert "stride" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        simulator.main([*layer, "--plot", "x.png"])


def test_pictures(prices, tmp_path, monkeypatch):
    sweep = ["-i", "24", "32", "-w", "5", "7", "--sweep", "stride", "--plot"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        simulator.main([*sweep, str(tmp_path / "none.png")])
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(_calibration, "_measure", prices)
    assert simulator.main([*sweep, str(tmp_path / "some.png")]) == 0
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


def test_layers_name_their_tensors():
    layer = make_layer((4, 5), 3, 1, 1, False, "shift", 2, 6, 8, "float16", 3, 7)
    inputs, outputs = layer.tensors("attention_forward", layer.grid, layer.grid)
    assert inputs[:3] == [
        ((2, 4, 5, 6, 8), "float16"), ((2, 4, 5, 3, 8), "float16"), ((2, 4, 5, 3, 7), "float16"),
    ]  # fmt: skip
    assert outputs == [((2, 4, 5, 6, 7), "float16"), ((2, 4, 5, 6), "float32")]
