"""Which tests notice what: changes lines of a module, one at a time, and runs its tests on each.

    python tools/mutate.py plan.cpp _halos.py [--count 10] [--seed 1] [--only 3 5]
    python tools/mutate.py --list

A module is named by its file. Its mutations are drawn from the seed, and are the same for the same
seed and source. Each is made in a copy of the checkout, in `build/mutate`, built and judged there
by the tests, up to the first that fails. One that hangs is noticed by the time limit. What
nothing notices either changes nothing that matters, as many limits of speed, or lacks a test.

The tests of Python files run on the package that is installed, with the files of this checkout. The
library is built for the one instruction set that every processor has: its kernels compile once.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # that tests, or a compiler, may take


@dataclass(frozen=True)
class Module:
    """A file, and what judges it: files of pytest, or filters of GoogleTest, after which all the
    other tests run."""

    path: str
    tests: tuple[str, ...]

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py")


PYTHON, CPP = "python/natten/", "libnatten/src/"
FUSED, UNFUSED = "*/Fused.*/vectorized_*", "*/Unfused.*/vectorized_*"
SLOW = "*/naive_*:Interruption.*:TunerSearch.EndsInTime"  # or of little to say, on a busy machine
ENTRY = ("Lists.*", "Memory.*", "Workspace.*", "Registry.*", "Description.*")
MODULES = {
    module.path.removeprefix(PYTHON).removeprefix(CPP): module
    for module in (
        Module(
            "libnatten/include/natten/neighborhood.h", ("Windows.*", "MostColumns.*", "KeyRange.*")
        ),
        Module(CPP + "attention.cpp", ENTRY),
        Module(CPP + "cpu/engine/backward_key.cpp", (FUSED,)),
        Module(CPP + "cpu/engine/backward_query.cpp", (FUSED,)),
        Module(CPP + "cpu/engine/bias.cpp", (FUSED,)),
        Module(CPP + "cpu/engine/exchange.h", (FUSED,)),
        Module(CPP + "cpu/engine/forward.cpp", (FUSED,)),
        Module(CPP + "cpu/engine/loader.h", (FUSED,)),
        Module(CPP + "cpu/engine/packed_lines.h", (FUSED,)),
        Module(CPP + "cpu/engine/plan.cpp", (FUSED,)),
        Module(CPP + "cpu/engine/stream.cpp", (FUSED, UNFUSED)),
        Module(CPP + "cpu/engine/unfused.cpp", (UNFUSED,)),
        Module(CPP + "cpu/merge.cpp", ("MergeRows.*", "*/Merge.*")),
        Module(CPP + "cpu/pool.cpp", ("Threading.*", "Interruption.*")),
        Module(CPP + "cpu/simd/walk-inl.h", (FUSED,)),
        Module(CPP + "memory.cpp", ("Refusals.*", "Memory.*")),
        Module(CPP + "validate.cpp", ("Refusals.*", "Description.*")),
        Module(
            PYTHON + "_args.py",
            ("test_bad_arguments", "test_names", "test_torch_parts", "test_numpy"),
        ),
        Module(PYTHON + "_halos.py", ("test_distributed", "test_torch_distributed")),
        Module(PYTHON + "context.py", ("test_context", "test_names", "test_tuner", "test_config")),
        Module(PYTHON + "flax/_attend.py", ("test_flax", "test_bad_arguments")),
        Module(PYTHON + "flops.py", ("test_flops",)),
        Module(
            PYTHON + "jax/_derivatives.py", ("test_jax", "test_jax_derivatives", "test_jax_varlen")
        ),
        Module(
            PYTHON + "jax/_functions.py",
            ("test_jax", "test_jax_varlen", "test_jax_parts", "test_jax_distributed"),
        ),
        Module(PYTHON + "jax/_primitives.py", ("test_jax", "test_jax_varlen")),
        Module(PYTHON + "numpy.py", ("test_numpy", "test_config", "test_names")),
        Module(PYTHON + "torch/_autograd.py", ("test_torch", "test_torch_derivatives")),
        Module(PYTHON + "torch/_composed.py", ("test_torch_composed",)),
        Module(
            PYTHON + "torch/_ops.py", ("test_torch", "test_torch_derivatives", "test_torch_modes")
        ),
    )
}


# ---- mutations ----


@dataclass(frozen=True)
class Mutation:
    line: int  # counted from 1
    kind: str
    before: str
    after: str


def swapped(*pairs: tuple[str, str]) -> Callable[[str, random.Random], str]:
    other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    return lambda text, _: other[text]


def off_by_one(text: str, draw: random.Random) -> str:
    return str(int(text) + draw.choice((1, -1) if int(text) else (1,)))


def in_turn(text: str, _: random.Random) -> str:
    return ", ".join(reversed(text.split(", ")))


Rule = tuple[str, str, Callable[[str, random.Random], str]]
# What a pattern's group becomes. Large constants are limits, of which one more seldom matters.
BOTH: tuple[Rule, ...] = (
    ("comparison", r" (<=?|>=?|==|!=) ", swapped(("<", "<="), (">", ">="), ("==", "!="))),
    ("sign", r" ([+-]=?) ", swapped(("+", "-"), ("+=", "-="))),
    ("constant", r"(?<![\w.])(\d)(?![\w.])", off_by_one),
    ("min, max", r"\b(min|max)(?=[(<])", swapped(("min", "max"))),
    ("arguments", r"(?<!instance\()(?<=[\w>]\()([a-z_][\w.]*, [a-z_][\w.]*)(?=[,)])", in_turn),
)
CPP_RULES: tuple[Rule, ...] = (
    *BOTH,
    ("factor", r" ([*/]) ", swapped(("*", "/"))),
    ("and, or", r" (&&|\|\|) ", swapped(("&&", "||"))),
    ("truth", r"\b(true|false)\b", swapped(("true", "false"))),
    ("condition", r"\bif \((.*)\)(?: [^()]*(?:\(\))?;| \{)?$", lambda text, _: f"!({text})"),
    ("statement", r"^\s+([\w.>:\[\]-]+(?:\(.*\)| [-+*|]?= .*);)$", lambda *_: "{}"),
    ("statement", r"^\s+((?:break|continue);)$", lambda *_: "{}"),
)
PYTHON_RULES: tuple[Rule, ...] = (
    *BOTH,
    ("factor", r" (\*|//) ", swapped(("*", "//"))),
    ("and, or", r" (and|or) ", swapped(("and", "or"))),
    (
        "is, in",
        r"^(?!.*\bfor\b).*? (is not|not in|is|in) ",
        swapped(("is", "is not"), ("in", "not in")),
    ),
    ("truth", r"(?<!strict=)\b(True|False)\b", swapped(("True", "False"))),
    ("condition", r"^\s+(?:el)?if (.*):$", lambda text, _: f"not ({text})"),
    ("condition", r" if ([^\[\]]*) else ", lambda text, _: f"not ({text})"),
    ("statement", r"^\s+([\w.\[\]]+(?:\(.*\)| [-+*|]?= .*))$", lambda *_: "pass"),
    ("statement", r"^\s+(break|continue)$", lambda *_: "pass"),
)


def without_text_in_cpp(source: str) -> str:
    """The same with blanks for comments, strings, characters, directives and messages of errors."""
    pattern = (
        r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'"
        r"|^\s*#(?:[^\n]*\\\n)*[^\n]*|\b(?:static_assert|throw)\b[^;]*;|\btemplate <[^\n]*"
    )
    blank = lambda found: re.sub(r"[^\n]", " ", found[0])  # noqa: E731
    return re.sub(pattern, blank, source, flags=re.DOTALL | re.MULTILINE)


def without_text_in_python(source: str) -> str:
    """The same with blanks for comments, strings, imports and errors that are raised."""
    rows = [list(line) for line in source.splitlines()]

    def blank(begin: tuple[int, int], end: tuple[int, int]) -> None:
        for row in range(begin[0] - 1, end[0]):
            low = begin[1] if row == begin[0] - 1 else 0
            high = end[1] if row == end[0] - 1 else len(rows[row])
            rows[row][low:high] = " " * (high - low)

    depth, start = 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind.endswith("STRING_START"):
            depth, start = depth + 1, start if depth else token.start
        elif kind.endswith("STRING_END"):
            depth -= 1
            if depth == 0:
                blank(start, token.end)
        elif kind in ("STRING", "COMMENT"):
            blank(token.start, token.end)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.Assert):
            end = node.end_lineno or node.lineno
            blank((node.lineno, 0), (end, len(rows[end - 1])))
    return "\n".join("".join(row) for row in rows)


def mutations_of(module: Module, seed: int, count: int) -> list[Mutation]:
    """Some of all mutations of a module, of each kind about as many."""
    source = (ROOT / module.path).read_text()
    lines = source.splitlines()
    code = (without_text_in_python if module.is_python else without_text_in_cpp)(
        source
    ).splitlines()
    draw = random.Random(f"{seed} {module.path}")
    by_kind: dict[str, list[Mutation]] = {}
    for kind, pattern, change in PYTHON_RULES if module.is_python else CPP_RULES:
        for number, text in enumerate(code):
            if kind == "statement" and not is_whole(code, number, module.is_python):
                continue
            for found in re.finditer(pattern, text):
                begin, end = found.span(1)
                part = lines[number][begin:end]
                if part.count("(") != part.count(")"):
                    continue
                after = lines[number][:begin] + change(part, draw) + lines[number][end:]
                mutation = Mutation(number + 1, kind, lines[number], after)
                by_kind.setdefault(kind, []).append(mutation)
    ranked = []
    for found_of_kind in by_kind.values():
        draw.shuffle(found_of_kind)
        ranked += [(turn, draw.random(), m) for turn, m in enumerate(found_of_kind)]
    ranked.sort(key=lambda entry: entry[:2])
    return [mutation for _, _, mutation in ranked[:count]]


def is_whole(code: list[str], number: int, is_python: bool) -> bool:
    """Whether a line is a statement and no part of one."""
    brackets = [sum(code[number].count(c) for c in both) for both in ("([{", ")]}")]
    if brackets[0] != brackets[1]:
        return False
    before = next((line.rstrip() for line in reversed(code[:number]) if line.strip()), "")
    if is_python:
        return not before.endswith((",", "(", "[", "{"))
    return before.endswith((";", "{", "}", ")", "else", ":"))


# ---- the copy in which they are made ----


def said_by(command: list[str], cwd: Path, limit: float, **env: str) -> tuple[int | None, str]:
    """The exit status of a command, None past the limit, and all that it has said."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def write(path: Path, data: bytes) -> None:
    """Not where it is that already, which would have it compiled again."""
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class Copy:
    """The checkout's files, and what is built of them."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.tree, self.site, self.jobs = folder / "tree", folder / "site", jobs
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                write(self.tree / name, (ROOT / name).read_bytes())

    def prepare(self, module: Module) -> None:
        if module.is_python:
            spec = importlib.util.find_spec("natten")
            if spec is None or spec.origin is None:
                sys.exit("natten is not installed: its compiled module is needed")
            shutil.copytree(Path(spec.origin).parent, self.site / "natten", dirs_exist_ok=True)
            shutil.copytree(ROOT / "python/natten", self.site / "natten", dirs_exist_ok=True)
        else:
            options = {
                "NATTEN_TEST_EMULATED_CUDA": "OFF",
                "NATTEN_BUILD_BENCHMARKS": "OFF",
                "NATTEN_WARNINGS_AS_ERRORS": "OFF",  # a mutant's unused variables are no matter
                "CMAKE_SYSTEM_NAME": "Linux",
                "CMAKE_SYSTEM_PROCESSOR": "any",  # so that there are kernels for `base` only
                **({"CMAKE_CXX_COMPILER_LAUNCHER": "ccache"} if shutil.which("ccache") else {}),
            }
            command = ["cmake", "--preset", "tests", "-B", "build"]
            command += [f"-D{name}={value}" for name, value in options.items()]
            status, text = said_by(command, self.tree, SECONDS)
            if status != 0:
                sys.exit(text)

    def build(self, module: Module, source: str) -> bool:
        """Of the module with another source; whether it compiles."""
        path = Path(module.path)
        if module.is_python:
            try:
                ast.parse(source)
            except SyntaxError:
                return False
            write(self.site / "natten" / path.relative_to(PYTHON), source.encode())
            write(self.tree / path, source.encode())
            return True
        write(self.tree / path, source.encode())
        command = ["cmake", "--build", "build", "--target", "natten_tests", "-j", str(self.jobs)]
        status, _ = said_by(command, self.tree, 3600, CCACHE_BASEDIR=str(self.tree))
        return status == 0

    def noticed(self, module: Module, limit: float) -> str | None:
        """The first test that fails."""
        commands = []
        if module.is_python:
            files = [f"tests/{name}.py" for name in module.tests]
            command = ["python", "-m", "pytest", "-x", "-m", "not long", "-p", "no:cacheprovider"]
            commands.append([*command, *files])
        else:
            own = ":".join(module.tests)
            for tests in (own, f"-{own}:{SLOW}"):
                commands.append(["build/cpp_tests/natten_tests", f"--gtest_filter={tests}"])
                commands[-1] += ["--gtest_fail_fast", "--gtest_break_on_failure=0"]
        # Bytecode is told from a changed file by whole seconds and sizes.
        env = {"PYTHONPATH": str(self.site), "PYTHONDONTWRITEBYTECODE": "1"}
        env["OMP_WAIT_POLICY"] = "passive"  # leaves the processors to other work
        for command in commands:
            status, text = said_by(command, self.tree, limit, **env)
            if status is None:
                return f"the time limit, {limit:.0f} s"
            if status != 0:
                failed = re.search(r"^(?:FAILED|ERROR|\[  FAILED  \]) (\S+)", text, re.MULTILINE)
                started = re.findall(r"^\[ RUN      \] (\S+)", text, re.MULTILINE)
                if failed:
                    return failed[1].rstrip(",")
                return f"{started[-1] if started else command[0]}, which ends with {status}"
        return None


def judge(module: Module, copy: Copy, seed: int, count: int, only: list[int]) -> None:
    """Prints what becomes of each mutation, and their sums."""
    source = (ROOT / module.path).read_text()
    copy.prepare(module)
    if not copy.build(module, source):
        sys.exit(f"{module.path} does not compile as it is")
    begin = time.monotonic()
    if by := copy.noticed(module, SECONDS):
        sys.exit(f"The tests of {module.path} fail as it is: {by}")
    seconds = time.monotonic() - begin
    drawn = mutations_of(module, seed, count)
    print(f"{module.path}: {len(drawn)} mutations, seed {seed}; its tests take {seconds:.0f} s")
    results = []
    for number, mutation in enumerate(drawn, 1):
        if only and number not in only:
            continue
        print(f"{number:3} {module.path}:{mutation.line}  {mutation.kind}")
        print(f"      - {mutation.before.strip()}\n      + {mutation.after.strip()}", flush=True)
        lines = source.splitlines(keepends=True)
        lines[mutation.line - 1] = mutation.after + "\n"
        if not copy.build(module, "".join(lines)):
            results.append("does not compile")
            print("      does not compile", flush=True)
            continue
        by = copy.noticed(module, 3 * seconds + 30)
        results.append("noticed" if by else "not noticed")
        print(f"      noticed by {by}" if by else "      NOT NOTICED", flush=True)
    sums = ", ".join(f"{results.count(name)} {name}" for name in sorted(set(results)))
    print(f"{module.path}: {sums}\n", flush=True)
    copy.build(module, source)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="names, or the ends of names, that --list shows")
    parser.add_argument("--count", type=int, default=10, help="mutations of each module")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="+", default=[], help="numbers of mutations")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutate")
    parser.add_argument("--list", action="store_true", help="modules and their tests")
    parser.add_argument("--dry", action="store_true", help="the mutations only")
    arguments = parser.parse_args()
    if arguments.list:
        for name, module in MODULES.items():
            print(f"{name:32} {' '.join(module.tests)}")
        return
    chosen = []
    for wanted in arguments.modules:
        found = [m for name, m in MODULES.items() if f"/{name}".endswith(f"/{wanted}")]
        if len(found) != 1:
            parser.error(f"{wanted} names {len(found)} modules; --list shows them")
        chosen += found
    if arguments.dry:
        for module in chosen:
            for number, m in enumerate(mutations_of(module, arguments.seed, arguments.count), 1):
                print(f"{number:3} {module.path}:{m.line}  {m.kind}")
                print(f"      - {m.before.strip()}\n      + {m.after.strip()}")
        return
    copy = Copy(arguments.folder.resolve(), arguments.jobs)
    for module in chosen:
        judge(module, copy, arguments.seed, arguments.count, arguments.only)


if __name__ == "__main__":
    main()
