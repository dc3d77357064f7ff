"""Versions that are written in several places agree."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import natten

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_written_once():
    """In CMakeLists.txt, which pyproject.toml names."""
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version"]
    (provider,) = PROJECT["tool"]["dynamic-metadata"]
    found = re.search(provider["regex"], (ROOT / provider["input"]).read_text(), re.MULTILINE)
    assert found, "the regular expression in pyproject.toml finds no version in CMakeLists.txt"
    assert natten.__version__ == metadata.version("natten") == found["value"]


def test_the_file_for_citations_has_the_version():
    assert f"\nversion: {natten.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def lines(name: str) -> set[str]:
    text = (ROOT / "requirements" / name).read_text().splitlines()
    return {line for line in text if line and not line.startswith("#")}


def test_build_requirements():
    required = set(PROJECT["build-system"]["requires"])
    pins = lines("xla-headers.txt")
    assert {r for r in required if r.startswith("jaxlib")} == pins
    assert required - pins <= lines("build.txt")


def test_headers_for_wheels_without_a_jaxlib():
    """cibuildwheel takes them from a wheel of jaxlib for another system: of the same version."""
    (override,) = PROJECT["tool"]["cibuildwheel"]["overrides"]
    pins = re.findall(r"jaxlib==([\d.]+)", " ".join(override["before-build"]))
    oldest = [re.search(r"==([\d.]+); python_version <", line) for line in lines("xla-headers.txt")]
    assert pins == [found[1] for found in oldest if found]


def test_the_table_of_wheels():
    """docs/support.md has a row for each platform that `make wheels` knows."""
    text = (ROOT / "tools/wheels.py").read_text()
    systems = re.findall(r'^    "([\w]+)": System', text, re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/support.md").read_text(), re.MULTILINE)
    assert systems and sorted(set(rows)) == sorted(systems)


def test_jaxlib_is_pinned_once_for_each_python():
    """A range would take the newest, whose headers older versions of JAX cannot run."""
    pins = [re.fullmatch(r"jaxlib==([\d.]+); python_version (<|>=) '3.(\d+)'", pin)
            for pin in sorted(lines("xla-headers.txt"))]  # fmt: skip
    below, above = [(p[1], p[2], p[3]) for p in pins if p]
    assert (below[1], above[1]) == ("<", ">=") and below[2] == above[2]


def test_the_oldest_jax():
    pins = re.findall(r"jaxlib==([\d.]+)", " ".join(lines("xla-headers.txt")))
    oldest = min(pins, key=lambda version: [int(n) for n in version.split(".")])
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = f"jax>={oldest}"
    assert wanted in extras["jax"] and wanted in extras["flax"]
    assert wanted in lines("demo.txt") and wanted in lines("test.txt")
    for page in ("README.md", "docs/jax.md"):
        assert f"JAX {oldest}" in (ROOT / page).read_text(), page


def test_pythons():
    """As classified, and the one whose stable ABI is used."""
    classifiers = " ".join(PROJECT["project"]["classifiers"])
    minors = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", classifiers)]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["project"]["requires-python"] == f">=3.{minors[0]}"
    assert PROJECT["tool"]["scikit-build"]["wheel"]["py-api"] == "cp312"
