"""The tool that changes lines of a module to see which tests notice."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from mutate import (
    MODULES,
    ROOT,
    Module,
    mutations_of,
    without_text_in_cpp,
    without_text_in_python,
)


def test_modules_and_their_tests_are_there():
    cpp_tests = "".join(path.read_text() for path in (ROOT / "cpp_tests").glob("*_test.cpp"))
    suites = set(re.findall(r"TEST(?:_P|_F)?\((\w+),", cpp_tests))
    for module in MODULES.values():
        assert (ROOT / module.path).is_file()
        for tests in module.tests:
            if module.is_python:
                assert (ROOT / f"tests/{tests}.py").is_file()
            else:
                assert re.findall(r"\w+(?=\.)", tests)[0] in suites


def test_comments_and_texts_are_left_out():
    cpp = 'f(1);  // a == b\n#define A 1\nthrow Error("x" + y);\ng("1 < 2", \'0\');\n'
    assert without_text_in_cpp(cpp).split() == ["f(1);", "g(", ",", ");"]
    python = 'import a\n"""1 == 2"""\n\ndef f(x=1):\n    raise E(x < 1)\n\na = f"{b} + 1"  # 1\n'
    assert without_text_in_python(python).split() == ["def", "f(x=1):", "a", "="]


def test_mutations_are_those_of_the_seed():
    module = MODULES["_halos.py"]
    drawn = mutations_of(module, 3, 20)
    assert drawn == mutations_of(module, 3, 20) != mutations_of(module, 4, 20)
    assert len({mutation.kind for mutation in drawn}) >= 8
    lines = (ROOT / module.path).read_text().splitlines()
    for mutation in drawn:
        assert mutation.before == lines[mutation.line - 1] != mutation.after
        changed = [*lines[: mutation.line - 1], mutation.after, *lines[mutation.line :]]
        ast.parse("\n".join(changed))


def test_what_mutations_are(tmp_path, monkeypatch):
    monkeypatch.setattr("mutate.ROOT", tmp_path)
    (tmp_path / "a.cpp").write_text("int f() {\n  if (a < b) return;\n  x += g(a, b);\n}\n")
    assert {(m.kind, m.after.strip()) for m in mutations_of(Module("a.cpp", ()), 1, 99)} == {
        ("comparison", "if (a <= b) return;"),
        ("condition", "if (!(a < b)) return;"),
        ("arguments", "x += g(b, a);"),
        ("sign", "x -= g(a, b);"),
        ("statement", "{}"),
    }
