"""The reference of the public names, as Markdown: from docstrings of Python modules, which it
imports, and from the comments of C++ headers. `tools/site.py` makes pages of it."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

# By module, what its page begins with where the docstring does not serve.
MODULES = (
    "natten",
    "natten.functional",
    "natten.distributed",
    "natten.flops",
    "natten.varlen",
    "natten.jax",
    "natten.flax",
    "natten.numpy",
)
_SECTIONS = ("Args:", "Returns:", "Raises:")
_CODE = re.compile(r"(`[^`]*`)")


def escaped(text: str) -> str:
    """Text in which only what stands between backticks means something to Markdown."""
    parts = _CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*\[\]<>])", r"\\\1", part) for part in parts
    )


def _items(lines: Iterable[str]) -> Iterator[str]:
    """The entries of a section, each in one line: those that follow are indented, or an entry is
    a list of names that fills a line."""
    item = ""
    for line in lines:
        if line.startswith(" ") or item.endswith(","):
            item += " " + line.strip()
        else:
            if item:
                yield item
            item = line
    if item:
        yield item


def _prose(text: str) -> str:
    """Paragraphs, and indented blocks as code."""
    blocks = []
    for block in re.split(r"\n\n+", text.strip("\n")):
        if block.startswith("    "):
            blocks.append(f"```python\n{inspect.cleandoc(block)}\n```")
        else:
            blocks.append(escaped(block))
    return "\n\n".join(blocks)


def markdown_of(docstring: str) -> str:
    """A docstring with sections, as Markdown."""
    headers = "|".join(map(re.escape, _SECTIONS))
    text, *sections = re.split(rf"^({headers})\n", docstring, flags=re.MULTILINE)
    blocks = [_prose(text)]
    for header, body in zip(sections[::2], sections[1::2], strict=True):
        body = inspect.cleandoc(body)
        blocks.append(f"**{header.rstrip(':')}**")
        if header == "Returns:":
            blocks.append(_prose(body))
            continue
        entries = []
        for item in _items(body.splitlines()):
            names, _, meaning = item.partition(": ")
            entries.append(f"- `{names}`: {escaped(meaning)}" if meaning else f"- {escaped(item)}")
        blocks.append("\n".join(entries))
    return "\n\n".join(blocks)


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return getattr(annotation, "__name__", str(annotation))


def signature_of(name: str, function: Any) -> str:
    """How it is called, one argument per line where one line would be long."""
    signature = inspect.signature(function)
    parts: list[str] = []
    kinds = [p.kind for p in signature.parameters.values()]
    for i, p in enumerate(signature.parameters.values()):
        if p.kind is p.KEYWORD_ONLY and p.VAR_POSITIONAL not in kinds and p.kind not in kinds[:i]:
            parts.append("*")
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        is_typed = p.annotation is not p.empty
        if is_typed:
            text += f": {_annotation(p.annotation)}"
        if p.default is not p.empty:
            text += f" = {p.default!r}" if is_typed else f"={p.default!r}"
        parts.append(text)
    result = signature.return_annotation
    end = ")" if result is signature.empty else f") -> {_annotation(result)}"
    line = f"{name}({', '.join(parts)}{end}"
    return line if len(line) <= 88 else "\n".join([f"{name}(", *(f"    {p}," for p in parts), end])


def _methods(cls: type) -> dict[str, Any]:
    """The documented methods that users call, by name."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if not base.__module__.startswith("natten"):
            continue
        for name, value in vars(base).items():
            is_public = not name.startswith("_") or name == "__call__"
            if is_public and isinstance(value, types.FunctionType) and value.__doc__:
                found.setdefault(name, value)
    return found


def _entry(name: str, value: Any) -> str:
    """One function or class."""
    if not callable(value):
        return f"`{value!r}`"
    blocks = [
        f"```python\n{signature_of(name, value)}\n```",
        markdown_of(inspect.getdoc(value) or ""),
    ]
    if isinstance(value, type):
        for method, function in _methods(value).items():
            blocks += [
                f"```python\n{signature_of(f'{name}.{method}', function)}\n```",
                markdown_of(inspect.getdoc(function) or ""),
            ]
    return "\n\n".join(block for block in blocks if block)


def _families(names: Iterable[str], entries: dict[str, str]) -> list[list[str]]:
    """Names whose entries differ in the number of axes only, together."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(re.sub("[123]", "#", name + entries[name]), []).append(name)
    return list(families.values())


def python_page(module_name: str) -> str:
    """The page of a module: an entry for each name in its `__all__`."""
    module = import_module(module_name)
    values = {name: getattr(module, name) for name in module.__all__}
    first: dict[int, str] = {}
    same: dict[str, str] = {}  # other names of a function, and its first
    for name, value in values.items():
        if callable(value) and first.setdefault(id(value), name) != name:
            same[name] = first[id(value)]
    entries = {
        name: f"The same as `{same[name]}`." if name in same else _entry(name, value)
        for name, value in values.items()
    }
    blocks = [f"# {module_name}", _prose(inspect.getdoc(module) or "")]
    for family in _families(values, entries):
        shown = family[len(family) // 2]
        blocks.append("## " + ", ".join(f"`{name}`" for name in family))
        if len(family) > 1:
            blocks.append(f"Here `{shown}`; the others differ in the number of axes only.")
        blocks.append(entries[shown])
    return "\n\n".join(blocks) + "\n"


def _declarations(text: str) -> Iterator[tuple[str, str]]:
    """(comment, code), either of which may be empty, of what a header declares in the namespace
    natten, in its order; without bodies of functions, and without the namespace natten::detail."""
    lines = iter(text.splitlines())
    comment: list[str] = []
    for line in lines:
        if line.startswith("///"):
            comment.append(line.removeprefix("///").removeprefix(" "))
            continue
        if re.match(r"namespace (?!natten)", line):
            for inner in lines:
                if inner == "}  // " + line.removesuffix(" {"):
                    break
            comment = []
            continue
        if line.startswith("template <>"):  # says nothing that the template does not
            for inner in lines:
                if inner == "};":
                    break
            comment = []
            continue
        if not line or line.startswith(("#", "//", "}", "namespace")):
            if comment and line.startswith("namespace"):
                yield "\n".join(comment), ""  # of the whole header
            comment = []
            continue
        code = [line]
        while not _is_complete(code):
            code.append(next(lines))
        yield "\n".join(comment), _without_bodies(code)
        comment = []


def _is_complete(code: list[str]) -> bool:
    text = "\n".join(re.sub(r"//.*", "", line) for line in code)
    is_closed = all(text.count(a) == text.count(b) for a, b in ("()", "{}"))
    return is_closed and text.rstrip().endswith((";", "}"))


def _without_bodies(code: list[str]) -> str:
    """Declarations in place of definitions of functions."""
    kept: list[str] = []
    at = 0
    while at < len(code):
        line = code[at]
        start = at
        opened = "\n".join(code[start : at + 1])
        while "(" in opened and not re.search(r"[;{}]\s*(//.*)?$", opened) and at + 1 < len(code):
            at += 1  # the declaration goes on
            opened = "\n".join(code[start : at + 1])
        is_function = re.search(r"\)[^()]*\{", opened) and not re.match(r"\s*(struct|class)", line)
        if not is_function:
            kept += code[start : at + 1]
            at += 1
            continue
        while opened.count("{") != opened.count("}"):
            at += 1
            opened = "\n".join(code[start : at + 1])
        kept.append(re.sub(r"\s*( : \w+\(.*)?\{.*", "", opened, flags=re.DOTALL) + ";")
        at += 1
    return _without_macros("\n".join(kept))


def _without_macros(code: str) -> str:
    """Without the words that only compilers need. Lines that continue move with the first."""
    lines: list[str] = []
    moved = 0
    for line in code.splitlines():
        plain = re.sub(r"\bNATTEN_(EXPORT|HOST_DEVICE) ", "", line)
        if lines and moved and line.startswith(" " * (moved + 4)):
            lines.append(line[moved:])
            continue
        moved = len(line) - len(plain)
        lines.append(plain)
    return "\n".join(lines)


def cpp_page(headers: Path) -> str:
    """The page of the C++ library: what each header declares."""
    blocks = [
        "# C++",
        "What `#include <natten/natten.h>` declares in the namespace `natten`, by header. "
        "[C++](../cpp.md) says how to use it.",
    ]
    for path in sorted(headers.glob("*.h")):
        declarations = list(_declarations(path.read_text()))
        if not declarations:
            continue
        blocks.append(f"## natten/{path.name}")
        code_before = ""
        for comment, code in declarations:
            if comment:
                blocks.append(escaped(comment))
            elif code and code_before:  # belongs to the same comment
                blocks.pop()
                code = f"{code_before}\n{code}"
            if code:
                blocks.append(f"```cpp\n{code}\n```")
            code_before = code
    return "\n\n".join(blocks) + "\n"
