"""The profiler, on problems of a few tokens."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import random

import pytest

import natten
from natten import _calibration, profiler

SEED = int(os.environ.get("NATTEN_TEST_SEED", "0"))
LAYER = [
    "-i",
    "6",
    "8",
    "-w",
    "3",
    "5",
    "-s",
    "1",
    "2",
    "-c",
    "False",
    "True",
    "-n",
    "4",
    "-d",
    "8",
]
QUICK = ["--warmup-steps", "0", "--optimize-warmup-steps", "0", "--steps", "1", "--dtype", "fp32"]
INSTALLED = [name for name in profiler.FRAMEWORKS if importlib.util.find_spec(name)]


@pytest.fixture(autouse=True)
def same_threads(monkeypatch):
    """And no measurements of this processor, nor a large product."""
    before = natten._core.num_threads()
    row = (1e-9,) * len(_calibration.COUNTS)
    names = ("forward", "backward", "backward_query", "backward_key")
    measured = lambda *_: _calibration.Prices(dict.fromkeys(names, row), 1)  # noqa: E731
    _calibration._prices.cache_clear()
    monkeypatch.delenv("NATTEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(_calibration, "_measure", measured)
    monkeypatch.setattr(profiler, "PRODUCT", 64)
    yield
    _calibration._prices.cache_clear()
    natten._core.set_num_threads(before)


def rows_of(tmp_path, *options: str) -> list[dict]:
    file = tmp_path / "figures.json"
    assert profiler.main([*LAYER, *QUICK, *options, "--json", str(file)]) == 0
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize("framework", INSTALLED)
def test_times_passes(framework, tmp_path, capsys):
    rows = rows_of(tmp_path, "--backprop", "--heads-kv", "2", "--framework", framework)
    assert [(row["pass_name"], row["backend"]) for row in rows] == [
        ("forward", "vectorized"), ("backward", "vectorized"),
    ]  # fmt: skip
    for row in rows:
        assert (
            min(row[name] for name in ("seconds", "flops_per_second", "of_product", "predicted"))
            > 0
        )
    assert "of product" in capsys.readouterr().out


def test_useful_work_is_counted():
    layer = natten._simulate.make_layer(
        (6, 8), (3, 5), 1, 1, (False, True), "shift", 2, 4, 8, "float32"
    )
    pairs = 2 * 4 * (6 * 3) * (1 + 2 + 3 + 4 + 5 * 4)
    flops = profiler.Problem(layer, 0, "cpu").flops
    assert flops == {"forward": 2 * pairs * 16, "backward": 2 * pairs * 40}
    more = profiler.Problem(layer, 3, "cpu").flops["forward"] - flops["forward"]
    assert more == 2 * 2 * 4 * 48 * 3 * 16


def test_backends_and_dry_run(tmp_path, capsys):
    assert rows_of(tmp_path, "--backend", "naive", "--no-prediction")[0]["backend"] == "naive"
    if "torch" in INSTALLED:
        rows = rows_of(tmp_path, "--backend", "composed", "--backprop", "--framework", "torch")
        assert [row["backend"] for row in rows] == ["composed", "composed"]
    # NATTEN's name of a fused backend.
    assert rows_of(tmp_path, "--backend", "cutlass-fna")[0]["backend"] == "vectorized"
    assert profiler.main([*LAYER, *QUICK, "--dry-run", "--backprop"]) == 0
    out = capsys.readouterr().out
    assert "forward pass, vectorized: the default" in out and "backward pass, naive: yes" in out


@pytest.mark.parametrize("framework", INSTALLED)
def test_optimize_asks_the_tuner(framework, tmp_path, capsys):
    before = natten._core.tuning()
    if framework == "jax":
        command = [*LAYER, *QUICK, "--optimize", "--framework", framework]
        assert profiler.main(command) == 1 and "JAX" in capsys.readouterr().err
        return
    rows = rows_of(tmp_path, "--optimize", "--backprop", "--framework", framework)
    assert all(row["backend"].startswith("vectorized") for row in rows)
    layer = natten._simulate.make_layer(
        (6, 8), (3, 5), (1, 2), 1, (False, True), "shift", 1, 4, 8, "float32"
    )
    natten._core.set_tuning("read", "read")
    try:
        for op in profiler.OPS.values():
            sizes = layer.tensors(op, layer.grid, layer.grid, ("grad_logsumexp",))
            answer = natten._core.tuned(op, layer.config(), None, "", sizes[0], "cpu", sizes[1])
            assert answer[1] == "tuned", (op, answer)
    finally:
        natten._core.set_tuning(*before[:2])
    assert natten._core.tuning() == before
    out = capsys.readouterr().out
    assert out.count("forward pass: ") == 1 and out.count("backward pass: ") == 1


def test_refuses(capsys):
    def refusal(*options):
        assert profiler.main([*LAYER, *QUICK, *options]) == 1
        return capsys.readouterr().err

    assert "kernel_size" in refusal("-w", "9", "9")
    assert 'got "nonsense"; must be one of' in refusal("--backend", "nonsense")
    assert "needs PyTorch and a CUDA device" in refusal("--backend", "cudnn")
    assert "--add-kv" in refusal("--add-kv", "-1")
    assert "bfloat16" in refusal("--framework", "numpy", "--dtype", "bf16")
    assert "only PyTorch's tensors" in refusal("--framework", "numpy", "--device", "cuda")
    if "torch" in INSTALLED:
        assert "--device: got nonsense; " in refusal("--framework", "torch", "--device", "nonsense")
    with pytest.raises(SystemExit):
        profiler.main(["-w", "3"])


def test_additional_tokens_and_pictures(tmp_path):
    pytest.importorskip("torch")
    rows = rows_of(tmp_path, "--add-kv", "3", "--backprop", "--framework", "torch", "--peers")
    assert rows[0]["predicted"] is None and rows[0]["seconds"] > 0
    assert "additional tokens" in rows[2]["refusal"]
    pytest.importorskip("matplotlib")
    rows_of(tmp_path, "--plot", str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").stat().st_size > 1000


class Sent(list):
    send = list.append


def test_peers_are_timed(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # what is set for a process
    monkeypatch.setattr(profiler.signal, "signal", lambda *_: None)
    from natten import _peers

    layer = natten._simulate.make_layer((6, 8), (3, 5), 1, 1, False, "shift", 1, 4, 8, "float32")
    options = profiler.PeerOptions(True, 0, 1, torch.get_num_threads())
    sent = Sent()
    profiler._send_peers(profiler.PEERS[1:], profiler.Problem(layer, 0, "cpu"), options, sent)
    passes = [(row.pass_name, row.backend) if row else None for row in sent]
    assert passes == [
        ("forward", "sdpa, mask"), ("backward", "sdpa, mask"), None,
        ("forward", "sdpa, all tokens"), ("backward", "sdpa, all tokens"), None,
    ]  # fmt: skip
    assert all(row.seconds > 0 and not row.refusal for row in sent if row)
    # One whose mask would not fit into memory.
    layer = natten._simulate.make_layer((200, 200), 3, 1, 1, False, "shift", 1, 1, 1, "float32")
    ways = _peers.ways(layer, "cpu", lambda *_: {})
    for name in profiler.PEERS[:2]:
        with pytest.raises(ValueError, match=r"of all pairs needs 35\.2 GB"):
            ways[name](False)


def test_peers_take_no_longer_than_they_may(tmp_path):
    pytest.importorskip("torch")
    rows = rows_of(tmp_path, "--no-prediction", "--peers", "--peer-seconds", "0")[1:]
    assert [row["backend"] for row in rows] == list(profiler.PEERS)
    for row in rows:
        assert row["refusal"] == "not timed: took more than 0 s (--peer-seconds)"


def test_peers_whose_process_ends_are_told():
    class Ended:
        exitcode = -9

        def join(self):
            pass

    row = profiler.Timing("forward", "a", 1.0)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    for message in (row, None, row):
        theirs.send(message)
    theirs.close()
    names = ["a", "b", "c"]
    *rows, last = profiler._receive_peers(names, 5.0, Ended(), ours)
    assert rows == [row, row] and names == ["c"]
    assert (last.pass_name, last.backend) == ("backward", "b")
    assert last.refusal == "not timed: its process ended, with -9"


def test_peers_compute_the_same():
    torch = pytest.importorskip("torch")
    from natten import _peers
    from natten.functional import na1d, na2d, na3d

    rng = random.Random(SEED)
    for number in range(12):
        rank = rng.randint(1, 3)
        window = {
            "kernel_size": tuple(rng.randint(1, 3) for _ in range(rank)),
            "dilation": tuple(rng.randint(1, 2) for _ in range(rank)),
            "boundary": tuple(rng.choice(("shift", "cut", "circular")) for _ in range(rank)),
        }
        grid = tuple(2 * rng.randint(3, 5) for _ in range(rank))
        layer = natten._simulate.make_layer(
            grid, window["kernel_size"], 1, window["dilation"], False, window["boundary"], 2, 4, 8,
            "float64", 2, 6,
        )  # fmt: skip
        q, k, v = (
            torch.randn(2, *grid, heads, dim, dtype=torch.float64)
            for heads, dim in ((4, 8), (2, 8), (2, 6))
        )
        found = []
        ways = _peers.ways(layer, "cpu", lambda call, _: found.append(call(q, k, v)))  # noqa: B023
        ways["sdpa, mask"](False)
        kernel_size = window.pop("kernel_size")
        want = (na1d, na2d, na3d)[rank - 1](q, k, v, kernel_size, **window)
        assert torch.allclose(found[0], want), (
            f"seed {SEED}, problem {number}: {grid} {layer.window}"
        )
