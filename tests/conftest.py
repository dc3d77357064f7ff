"""Set before anything imports JAX: four devices of the one CPU, for the tests of sharding, and
quick compilation, on which JAX's tests spend most of their time. JAX_DISABLE_MOST_OPTIMIZATIONS=0
in the environment tests what XLA makes of the programs otherwise."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

flags = ["--xla_force_host_platform_device_count=8"]
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.util.find_spec("jaxlib"):
    version = importlib.metadata.version("jaxlib").split(".")
    if int(version[0]) == 0 and int(version[1]) <= 10:  # XLA aborts where it does not know a flag
        flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
