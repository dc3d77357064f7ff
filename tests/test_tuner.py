"""The tuner from Python: switches, the environment, records, and where nothing may be timed. The
search and the cache themselves are tested in cpp_tests/tuner_test.cpp."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from test_context import default_switches, deterministic_torch
from test_package import run_python

import natten
import natten.numpy as na
from natten import _core, tune
from natten._args import make_config

__all__ = ["default_switches", "deterministic_torch"]

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")
SHAPE = (1, 14, 30, 4, 8)
KERNEL = 5


@pytest.fixture(autouse=True)
def cache(tmp_path, default_switches):
    """An empty cache in a folder of its own, and little time for each problem."""
    folder = tmp_path / "cache"
    quick = (1, 1, 0.2, False)
    _core.set_tuning(None, None, quick, quick, str(folder))
    yield folder
    _core.set_tuning("off", "off", (5, 5, 2.0, False), (5, 5, 2.0, False), "")
    _core.tuning_notes()


def quickly() -> None:
    """After use_autotuner, which sets limits of its own."""
    _core.set_tuning(None, None, (1, 1, 0.2, False), (1, 1, 0.2, False))


def files(folder) -> int:
    return len(list(folder.glob("*"))) if folder.exists() else 0


@pytest.fixture
def tensors():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=generator, requires_grad=True) for _ in range(3)]


def origins(tensors, **options) -> dict[str, str]:
    """By pass, where the chosen backend's configuration comes from."""
    verdicts = natten.explain(*tensors, KERNEL, **options).verdicts
    return {v.operation: v.origin for v in verdicts if v.chosen}


def gradients(tensors) -> list:
    import torch

    output = natten.na2d(*tensors, KERNEL)
    return [output, *torch.autograd.grad(output.square().sum(), tensors)]


def test_a_pass_is_tuned_where_its_switch_is_on(tensors, cache):
    expected = gradients(tensors)
    assert origins(tensors) == {"forward": "", "backward": ""}
    natten.use_autotuner(True, False)
    quickly()
    assert origins(tensors) == {"forward": "default", "backward": "default"}
    first = gradients(tensors)
    assert origins(tensors) == {"forward": "tuned", "backward": "default"}
    assert files(cache) == 1
    natten.use_autotuner(None, True)
    quickly()
    second = gradients(tensors)
    assert origins(tensors) == {"forward": "tuned", "backward": "tuned"}
    assert files(cache) == 2
    for results in (first, second):
        assert all(x.equal(y) for x, y in zip(results, expected, strict=True))
    assert "(tuned)" in str(natten.explain(*tensors, KERNEL))
    natten.disable_autotuner()
    assert origins(tensors) == {"forward": "", "backward": ""}
    _core.set_tuning("read", "read", cache_dir="")
    _core.set_tuning(cache_dir=str(cache))  # forgets what is in memory
    natten.context._switches.tuning = True
    assert origins(tensors) == {"forward": "cache", "backward": "cache"}


def test_arguments_of_the_autotuner(monkeypatch):
    natten.use_autotuner(True, False, True, False, 1, 2, 3, 4)
    assert _core.tuning()[:2] == ("tune", "off")
    natten.use_autotuner(False, True)
    assert _core.tuning()[:2] == ("off", "tune")
    natten.disable_autotuner()
    assert _core.tuning()[:2] == ("off", "off")

    limits = []  # warm-up steps, steps, seconds, whether to be thorough: nothing tells them
    monkeypatch.setattr(_core, "set_tuning", lambda *args: limits.append(args[2:]))
    natten.use_autotuner(True, True, True, False, 1, 2, 3, 4)
    assert limits.pop() == ((1, 3, 10.0, True), (2, 4, 2.0, False))
    natten.use_autotuner(True, True, True, False, 2**70, 2**70)
    assert limits.pop() == ((10_000, 3, 10.0, True), (10_000, 4, 2.0, False))


def test_deterministic_modes(tensors, cache):
    import torch

    natten.use_autotuner(True, True)
    quickly()
    torch.use_deterministic_algorithms(True)
    try:
        gradients(tensors)
        assert files(cache) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    gradients(tensors)
    assert files(cache) == 2
    torch.use_deterministic_algorithms(True)
    try:  # nothing tuned is used
        assert origins(tensors) == {"forward": "default", "backward": "default"}
    finally:
        torch.use_deterministic_algorithms(False)
    assert origins(tensors) == {"forward": "tuned", "backward": "tuned"}
    natten.use_deterministic_algorithms()
    assert _core.tuning()[:2] == ("off", "off")
    assert origins(tensors) == {"forward": "", "backward": ""}


@pytest.mark.parametrize("way", ["compile", "trace", "second rank"])
def test_nothing_is_timed_in_graphs_and_on_other_ranks(way, tensors, cache, monkeypatch):
    import torch

    natten.use_autotuner(True, True)
    quickly()

    def call(*x):
        return natten.na2d(*x, KERNEL)

    if way == "compile":
        call = torch.compile(call, backend="eager", fullgraph=True)
    elif way == "trace":
        call = torch.jit.trace(call, tuple(tensors), check_trace=False)
    else:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for _ in range(2):
        torch.autograd.grad(call(*tensors).sum(), tensors)
    assert files(cache) == 0
    assert origins(tensors) == {"forward": "default", "backward": "default"}
    monkeypatch.undo()
    gradients(tensors)
    assert files(cache) == 2


def test_jax_reads_only(cache):
    jax = pytest.importorskip("jax")
    import natten.jax

    x = jax.numpy.ones(SHAPE)
    _core.set_tuning("tune", "tune")
    jax.grad(lambda x: natten.jax.na2d(x, x, x, KERNEL).sum())(x).block_until_ready()
    assert files(cache) == 0


def test_numpy_is_tuned(cache):
    x = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    expected = na.na2d(x, x, x, KERNEL)
    _core.set_tuning("tune", "tune")
    assert np.array_equal(na.na2d(x, x, x, KERNEL), expected)
    specs = [(SHAPE, "float32")] * 3 + [None] * 4
    config = make_config(2, KERNEL)
    assert _core.tuned("attention_forward", config, None, "", specs)[1] == "tuned"
    assert files(cache) == 1


@needs_torch
def test_a_folder_that_cannot_be_written(tensors, tmp_path, caplog):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    _core.set_tuning(cache_dir=str(blocked))
    natten.use_autotuner(True, True)
    quickly()
    with caplog.at_level(logging.WARNING, logger="natten"):
        for _ in range(3):
            gradients(tensors)
    (record,) = caplog.records
    assert "blocked" in record.getMessage() and record.levelno == logging.WARNING
    assert origins(tensors) == {"forward": "tuned", "backward": "tuned"}


@needs_torch
def test_garbage_in_the_folder_is_told_at_debug_level(tensors, cache, caplog):
    natten.use_autotuner(True, False)
    quickly()
    gradients(tensors)
    (file,) = cache.glob("*")
    file.write_text("garbage")
    _core.set_tuning(cache_dir="")
    _core.set_tuning(cache_dir=str(cache))
    with caplog.at_level(logging.DEBUG, logger="natten"):
        for _ in range(2):
            gradients(tensors)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG and file.name in record.getMessage()
    assert file.read_text() != "garbage"


RECORD = f"""
import numpy as np, natten.numpy
x = np.ones({SHAPE}, np.float32)
for kernel in (3, 5, 3):
    natten.numpy.na2d(x, x, x, kernel)
"""


def test_environment(tmp_path):
    """What a process records another tunes, and a third one reads."""
    record, folder = tmp_path / "problems.json", tmp_path / "tuned"
    run_python(RECORD, NATTEN_TUNE="record", NATTEN_TUNE_FILE=str(record))
    lines = record.read_text().splitlines()
    assert len(lines) == 2
    run_python(RECORD, NATTEN_TUNE="record", NATTEN_TUNE_FILE=str(record))  # appends
    assert len(tune.read_records(record)) == 2
    done = subprocess.run(
        [sys.executable, "-m", "natten.tune", record, "--cache-dir", folder, "--seconds", "0.2"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert "2/2" in done.stderr
    table = done.stdout.splitlines()
    assert len(table) == 3 and all(word in table[0] for word in ("default", "best", "gain"))
    assert "kernel 3x3" in table[1] and "kernel 5x5" in table[2]
    assert len(list(folder.glob("*.choice"))) == 2
    code = f"""
import natten
from natten import _core
from natten._args import make_config
specs = [({SHAPE}, "float32")] * 3 + [None] * 4
config = make_config(2, {KERNEL})
print(_core.tuned("attention_forward", config, None, "", specs)[1], *_core.tuning()[:2])
natten.use_autotuner(False, None)
print(*_core.tuning()[:2], natten.is_autotuner_enabled())
"""
    out = run_python(code, NATTEN_TUNE="read", NATTEN_CACHE_DIR=str(folder)).splitlines()
    assert out == ["cache read read", "off read False"]


def test_a_word_that_is_no_mode():
    code = RECORD.replace("\nfor", "\nimport natten\nprint(natten.is_autotuner_enabled())\nfor")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_python(code, NATTEN_TUNE="always")
    assert 'NATTEN_TUNE: got "always"; must be off, read, record or tune' in caught.value.stderr


@pytest.fixture
def record(tmp_path):
    """A file with a record of this version."""
    path = tmp_path / "problems.json"
    run_python(RECORD, NATTEN_TUNE="record", NATTEN_TUNE_FILE=str(path))
    return path


def test_records_of_others_are_refused_by_name(record, tmp_path, capsys):
    good = record.read_text().splitlines()[0]
    row = json.loads(good)
    other = tmp_path / "other.json"
    for line, message in [
        (json.dumps({**row, "natten": "0.1.0"}), "was recorded by natten 0.1.0; this is natten"),
        ("garbage", "is no record of a problem"),
        ("[]", "is no record of a problem"),
        (json.dumps({**row, "threads": "2"}), "is no record of a problem"),
        (json.dumps({**row, "problem": "a b"}), "is no record of a problem"),
        (json.dumps({**row, "problem": row["problem"].replace("cpu", "x")}), "is no record of a"),
    ]:
        other.write_text(f"{good}\n{line}\n")
        assert tune.main([str(record), str(other)]) == 1
        assert f"other.json, line 2: {message}" in capsys.readouterr().err
    other.write_text(json.dumps({**row, "problem": row["problem"].replace("batch=1", "batch=-1")}))
    assert tune.main([str(other)]) == 1
    assert "got shape [-1" in capsys.readouterr().err
    assert tune.main([str(tmp_path / "missing.json")]) == 1
    assert "missing.json" in capsys.readouterr().err


def test_problems_of_a_gpu_are_refused(record, tmp_path, capsys):
    line = record.read_text().splitlines()[0]
    row = json.loads(line)
    row.update(threads=0, problem=row["problem"].replace(" cpu ", " cuda "))
    gpu = tmp_path / "gpu.json"
    gpu.write_text(json.dumps(row) + "\n")
    assert tune.main([str(gpu), "--seconds", "0.1"]) == 1
    captured = capsys.readouterr()
    assert "1 of 1 problems are not tuned, those of cuda" in captured.err
    assert captured.out.splitlines()[1].endswith("not tuned")
    gpu.write_text(f"{json.dumps(row)}\n{line}\n")
    assert tune.main([str(gpu), "--seconds", "0.1"]) == 0
    captured = capsys.readouterr()
    assert "1 of 2 problems are not tuned" in captured.err
    assert ["cuda" in text for text in captured.out.splitlines()] == [False, False, True]


def test_merge(record, tmp_path, capsys):
    first, second = record.read_text().splitlines()
    a, b, both = (tmp_path / name for name in ("a.json", "b.json", "both.json"))
    a.write_text(first + "\n")
    b.write_text(second + "\n" + first + "\n")
    assert tune.main(["--merge", str(both), str(a), str(b)]) == 0
    assert tune.read_records(both) == tune.read_records(record)
    assert "2 problems in" in capsys.readouterr().out

    folders = [tmp_path / name for name in ("tuned-a", "tuned-b", "tuned")]
    for path, folder in zip((a, b), folders, strict=False):
        assert tune.main([str(path), "--cache-dir", str(folder), "--seconds", "0.1"]) == 0
    assert tune.main(["--merge", *map(str, (folders[2], *folders[:2]))]) == 0
    assert "2 choices in" in capsys.readouterr().out
    assert len(list(folders[2].glob("*"))) == 2
    assert tune.main(["--merge", str(folders[2]), str(folders[0]), str(a)]) == 1
    assert "must be all of one kind" in capsys.readouterr().err
