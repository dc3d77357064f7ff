"""Lists of commands, packages and files that are written twice agree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, without the folder of its programs."""
    text = (ROOT / "Makefile").read_text()
    (lines,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    return [line.removeprefix("\t$(BIN)/") for line in lines.splitlines()]


def test_hooks_are_what_lint_runs():
    """On the files of a commit instead of all."""
    commands = [re.sub(r" (\.|\$\(CXX_FILES\))$", "", command) for command in recipe("lint")]
    hooks = [hook["entry"] for hook in HOOKS]
    assert sorted(commands) == sorted(entry for entry in hooks if entry != "make types")
    assert "make types" in hooks and recipe("types") == ["mypy"]
    assert re.search(r"^lint: types$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_hooks_have_the_versions_of_lint():
    pins = set((ROOT / "requirements" / "lint.txt").read_text().split())
    assert {pin for hook in HOOKS for pin in hook.get("additional_dependencies", [])} < pins


def test_hooks_see_the_files_of_lint():
    (pattern,) = [hook["files"] for hook in HOOKS if "files" in hook]
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."]
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        if folder.name not in ("build", "dist")
        for path in folder.rglob("*")
    ]
    hooked = {name for name in files if re.search(pattern, name)}
    find = re.search(
        r"^CXX_FILES := \$\(shell (.*)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert find
    found = subprocess.run(
        find[1], shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert hooked == set(found.stdout.split())


def test_the_devcontainer_has_the_packages_of_ci():
    wanted = re.search(r"^install_packages (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert wanted
    assert set(wanted[1].split()) <= set(
        (ROOT / ".devcontainer" / "Dockerfile").read_text().split()
    )
