"""One grid over four hosts: network namespaces that a bridge joins. What crosses their interfaces
is what `halo_bytes` says; a host that ends in mid-step ends the others' calls with an error; and a
checkpoint goes on with the same losses on a mesh of another shape."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HOSTS, TIMEOUT_S, LIMIT_S = 4, 20, 400
STEPS, SAVED = 4, 2  # steps of training, and the one before which the checkpoint is saved
OVERHEAD = 0.1  # of protocols, over what is sent

# ---- what a host does ----


def example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "distributed.py"
    spec = importlib.util.spec_from_file_location("distributed_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interface_bytes() -> tuple[int, int]:
    """(sent, received) by this host so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8]), int(numbers.split()[0])
    raise AssertionError("no eth0")


def traffic_of(mesh: Any) -> dict[str, list[int]]:
    """What crossed the interface in a few calls, and what `halo_bytes` says of them."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    import natten

    grid, calls = (60, 80), 8
    torch.manual_seed(0)
    tensors = [
        distribute_tensor(torch.randn(1, *grid, 4, 32), mesh, [Shard(1), Shard(2)],
                          src_data_rank=None).requires_grad_()
        for _ in range(3)
    ]  # fmt: skip

    def call() -> None:
        out = natten.na2d(*tensors, kernel_size=13, boundary="circular")
        out.to_local().sum().backward()

    call()  # which ranks compare
    dist.barrier()
    before = interface_bytes()
    for _ in range(calls):
        call()
    dist.barrier()
    after = interface_bytes()
    there = natten.distributed.halo_bytes(
        grid, mesh.shape, 13, boundary="circular", part=mesh.get_coordinate(),
        token_bytes=4 * (32 + 32) * 4,
    )  # fmt: skip
    both = calls * (there.sent + there.received)  # those of backward go the other way
    return {"counted": [b - a for a, b in zip(before, after, strict=True)], "said": [both, both]}


def work(rank: int, folder: str, is_second: bool) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    import natten

    torch.set_num_threads(1)
    natten.use_fused_na()
    # Hosts that import for different times wait for each other here, and later on not as long.
    limit, timeout = (datetime.timedelta(seconds=s) for s in (LIMIT_S, TIMEOUT_S))
    store = dist.TCPStore("10.77.0.1", 29511, HOSTS, is_master=rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=HOSTS, timeout=timeout)
    mesh = init_device_mesh("cpu", (4, 1) if is_second else (2, 2))
    globe = example()
    model, optimizer = globe.make(mesh)
    report: dict[str, Any] = {}

    def state() -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {"model": of_model, "optimizer": of_optimizer}

    if is_second:
        found = state()
        dcp.load(found, checkpoint_id=f"{folder}/checkpoint")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=found["model"],
            optim_state_dict=found["optimizer"],
        )
        report["losses"] = globe.train(mesh, model, optimizer, range(SAVED, STEPS))
    else:
        report["traffic"] = traffic_of(mesh)
        report["losses"] = globe.train(mesh, model, optimizer, range(SAVED))
        dcp.save(state(), checkpoint_id=f"{folder}/checkpoint")
        report["losses"] += globe.train(mesh, model, optimizer, range(SAVED, STEPS))
        now, _ = globe.fields(mesh, STEPS)
        out = model(now)
        dist.barrier()
        if rank == HOSTS - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        try:
            out.to_local().sum().backward()
        except RuntimeError as error:
            report["error"] = str(error)
        report["seconds"] = time.monotonic() - start
    Path(f"{folder}/{rank}-{is_second}.json").write_text(json.dumps(report))
    os._exit(0)  # rather than wait for a host that has ended


# ---- the hosts ----


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of namespaces, each with an interface eth0 of address 10.77.0.<number + 1>."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs Linux, root and iproute2")
    switch, names = f"natten-{os.getpid()}", [f"natten-{os.getpid()}-{i}" for i in range(HOSTS)]
    try:
        try:
            ip("netns", "add", switch)
            ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", switch, "link", "set", "bridge", "up")
            for i, name in enumerate(names):
                ip("netns", "add", name)
                ip("link", "add", "eth0", "netns", name, "type", "veth",
                   "peer", "name", f"port{i}", "netns", switch)  # fmt: skip
                ip("-n", switch, "link", "set", f"port{i}", "master", "bridge", "up")
                ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
                for interface in ("eth0", "lo"):
                    ip("-n", name, "link", "set", interface, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
        yield names
    finally:
        for name in (*names, switch):
            with contextlib.suppress(subprocess.SubprocessError):
                ip("netns", "del", name)


def run_on(hosts: list[str], folder: Path, is_second: bool) -> list[dict[str, Any] | None]:
    """What each host reports, None of one that was killed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    processes = []
    for rank, name in enumerate(hosts):
        program = f"import test_hosts; test_hosts.work({rank}, {str(folder)!r}, {is_second})"
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-c", program],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    end, said = time.monotonic() + LIMIT_S, []
    try:
        for process in processes:
            said.append(process.communicate(timeout=max(end - time.monotonic(), 1))[1])
    finally:
        for process in processes:
            process.kill()
    reports: list[dict[str, Any] | None] = []
    for rank, text in enumerate(said):
        path = folder / f"{rank}-{is_second}.json"
        if is_second or rank < HOSTS - 1:
            assert path.exists(), f"host {rank}: {text[-3000:]}"
        reports.append(json.loads(path.read_text()) if path.exists() else None)
    return reports


@pytest.mark.long
def test_four_hosts(hosts, tmp_path):
    torch = pytest.importorskip("torch")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    import natten

    globe = example()
    natten.use_fused_na()
    try:
        want = globe.train(None, *globe.make(None), range(STEPS))
    finally:
        natten.use_fused_na(False)

    *reports, killed = run_on(hosts, tmp_path, is_second=False)
    assert killed is None
    for rank, report in enumerate(reports):
        assert report is not None
        assert report["losses"] == pytest.approx(want, rel=1e-9), f"host {rank}"
        counted, said = report["traffic"]["counted"], report["traffic"]["said"]
        print(f"host {rank}: {counted} bytes on the interface, {said} of halos")
        for seen, halo in zip(counted, said, strict=True):
            assert halo <= seen <= (1 + OVERHEAD) * halo, f"host {rank}: {seen}, expected {halo}"
        assert "natten: ranks that hold parts of one grid" in report.get("error", "no error")
        assert report["seconds"] < TIMEOUT_S + 5

    for rank, report in enumerate(run_on(hosts, tmp_path, is_second=True)):
        assert report is not None
        assert report["losses"] == pytest.approx(want[SAVED:], rel=1e-9), f"host {rank}"
