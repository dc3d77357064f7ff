"""What happens to the process while it computes: signals, its end, forks."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
from test_package import run_python

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="needs signals")

# ---- signals ----

INTERRUPT = """
import os, signal, threading, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background

def interrupt(name, call):
    '''Prints the seconds from a signal to its exception. The call takes many seconds by itself.'''
    sent = []
    def send():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    timer = threading.Timer(0.2, send)
    timer.start()
    try:
        call()
    except KeyboardInterrupt:
        print(f"{time.perf_counter() - sent[0]:.3f} {name}")
    timer.join()
"""
NUMPY_CALLS = """
import numpy as np
import natten.numpy as na
from natten import _core
x = np.ones((1, 1 << 17, 4, 4), np.float32)
wide = np.ones((1, 1, 1 << 16, 1024), np.float32)
few = np.random.default_rng(0).standard_normal((1, 300, 2, 8))
want = na.na1d(few, few, few, 7)
for threads in (1, 2):
    _core.set_num_threads(threads)
    interrupt(f"vectorized, {threads} threads", lambda: na.attention(x, x, x))
    interrupt(f"naive, {threads} threads", lambda: na.attention(x, x, x, backend="naive"))
    interrupt(f"unfused, {threads} threads", lambda: na.na1d_qk(wide, wide, 2001))
    assert np.array_equal(na.na1d(few, few, few, 7), want)
"""
TORCH_CALLS = """
import torch
import natten.functional as F
from natten import _args
tokens = 1 << 17
x = torch.ones(1, tokens, 4, 4)
few = torch.randn(1, 300, 2, 8)
want = F.na1d(few, few, few, 7)

class Backward(torch.autograd.Function):  # without the seconds of a forward pass
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        y, config = grad.contiguous(), _args.make_config(1, tokens)
        absent, wanted = [None] * 4, [True] * 3 + [False] * 3
        return torch.ops.natten.attention_backward(
            x, x, x, *absent, torch.zeros(x.shape[:-1]), y, None, wanted, config, None, ""
        )[0]

output = Backward.apply(x.clone().requires_grad_()).sum()
for threads in (1, 2):
    torch.set_num_threads(threads)
    interrupt(f"forward, {threads} threads", lambda: F.attention(x, x, x))
    interrupt(f"backward, {threads} threads", lambda: output.backward(retain_graph=True))
    assert torch.equal(F.na1d(few, few, few, 7), want)
"""


@needs_signals
@pytest.mark.parametrize(
    "calls, count", [(NUMPY_CALLS, 6), pytest.param(TORCH_CALLS, 4, marks=needs_torch)]
)
def test_ctrl_c_ends_a_call(calls, count):
    printed = run_python(INTERRUPT + calls)
    print(printed)  # below 0.2 s on a processor that does nothing else
    seconds = [float(line.split()[0]) for line in printed.splitlines()]
    assert len(seconds) == count
    assert max(seconds) < 1


@needs_signals
def test_signal_handlers_run_during_a_call():
    """What they raise ends the call; where they return, it goes on. They may call the library."""
    run_python("""
import signal
import numpy as np
import natten.numpy as na
from natten import _core

_core.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((1, 1 << 14, 4, 4), np.float32)
few = x[:, :2000]
want, want_of_few = na.attention(x, x, x), na.na1d(few, few, few, 9)
calls = 0

def handler(*_):
    global calls
    calls += 1
    assert np.array_equal(na.na1d(few, few, few, 9), want_of_few)

signal.signal(signal.SIGALRM, handler)
for _ in range(5):  # as long as it takes to be interrupted twice in one call
    calls = 0
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    got = na.attention(x, x, x)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert np.array_equal(got, want)
    if calls >= 3:
        break
    x = np.concatenate([x, x], axis=1)
    want = na.attention(x, x, x)
else:
    raise SystemExit(f"{calls} calls")

class TimeIsUp(Exception):
    pass

def handler(*_):
    raise TimeIsUp

signal.signal(signal.SIGALRM, handler)
x = np.ones((1, 1 << 17, 4, 4), np.float32)
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    na.attention(x, x, x)
    raise SystemExit("went on")
except TimeIsUp:
    pass
""")


# ---- the end ----

EXIT = """
import random, sys, threading, time
{calls}
def work():
    while True:
        started.set()
        call()

started = threading.Event()
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
started.wait()
time.sleep({seconds})
"""
NUMPY_CALL = """
import numpy as np
import natten.numpy as na
x = np.ones((1, {tokens}, 4, 8), np.float32)
def call(): na.na1d(x, x, x, {kernel_size})
"""
TORCH_CALL = """
import torch
import natten.functional as F
x = torch.ones(1, {tokens}, 4, 8)
def call(): F.na1d(x, x, x, {kernel_size})
"""


@pytest.mark.parametrize(
    "call, tokens, repeats",
    [
        (NUMPY_CALL, 50, 5),
        (NUMPY_CALL, 2000, 5),
        pytest.param(TORCH_CALL, 2000, 2, marks=[needs_torch, pytest.mark.long]),
    ],
)
def test_exit_while_daemon_threads_compute(call, tokens, repeats):
    """Calls that end while the interpreter finalizes, which takes it some milliseconds."""
    call = call.format(tokens=tokens, kernel_size=tokens // 4)
    for i in range(repeats):
        run_python(EXIT.format(calls=call, seconds=0.01 * i))


def test_functions_called_at_exit():
    """By the main thread, after the module knows of the exit."""
    printed = run_python("""
import atexit
import numpy as np
x = np.ones((1, 2000, 4, 8), np.float32)
def last():  # registered before natten is imported, so it runs after what natten registers
    na.na1d(x, x, x, 101)
    print("done")
atexit.register(last)
import natten.numpy as na
""")
    assert printed.strip() == "done"


# ---- forks ----

USE_OPENMP = """
import os, sys, torch
torch.set_num_threads(2)
y = torch.ones(512, 512)
y @ y
y.exp()
x = torch.ones(1, 32, 32, 4, 32)
def threads():
    return len(os.listdir("/proc/self/task"))
def call():
    import natten.functional as F
    return F.na2d(x, x, x, 7)
"""


@needs_torch
@needs_fork
def test_import_in_a_forked_child():
    """OpenMP's threads are the parent's, and natten was not there to see the fork."""
    run_python(
        USE_OPENMP
        + """
pid = os.fork()
if pid == 0:
    import signal
    signal.alarm(30)  # rather than hang
    call()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    )


@needs_torch
@needs_fork
def test_import_in_a_worker_of_a_data_loader():
    run_python(
        USE_OPENMP
        + """
class Attended(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, i):
        torch.set_num_threads(2)  # more than a loader sets
        output = call()
        torch.set_num_threads(1)
        return output
loader = torch.utils.data.DataLoader(
    Attended(), num_workers=1, multiprocessing_context="fork", timeout=60
)
assert len(list(loader)) == 2 and "natten" not in sys.modules
"""
    )


@needs_torch
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_import_after_torch_has_started_its_threads():
    """They serve natten too, in processes that are not forked."""
    run_python(
        USE_OPENMP
        + """
before = threads()
assert before > 1
call()
assert threads() == before
"""
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
@pytest.mark.parametrize("library", ["", "libgomp.so.1", "libomp.so.5", "libiomp5.so"])
def test_openmp_runtimes(library):
    """GCC's, LLVM's and Intel's serve: with one thread allowed, none starts, unlike our pool."""
    printed = run_python(
        f"""
import ctypes, os
os.environ.update(OMP_THREAD_LIMIT="1", OPENBLAS_NUM_THREADS="1")
try:
    if {library!r}:
        ctypes.CDLL({library!r}, ctypes.RTLD_GLOBAL)
except OSError:
    print("missing")
    raise SystemExit
import numpy as np
import natten.numpy as na
run = na._core.run
class TwoThreads:
    @staticmethod
    def run(op, config, scale, backend, inputs, outputs, threads, allocate):
        return run(op, config, scale, backend, inputs, outputs, 2, allocate)
na._core = TwoThreads
x = np.ones((1, 32, 32, 4, 32), np.float32)
before = len(os.listdir("/proc/self/task"))
assert (na.na2d(x, x, x, 7) == 1).all()
assert len(os.listdir("/proc/self/task")) == before + {int(not library)}
"""
    )
    if printed.strip() == "missing":
        pytest.skip(f"needs {library}")
