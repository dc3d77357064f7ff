"""The pages that tools/reference.py makes of docstrings and headers, and the site's navigation."""

from __future__ import annotations

import importlib.util
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEADERS = ROOT / "libnatten" / "include" / "natten"

spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
assert spec and spec.loader
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


@pytest.mark.parametrize("name", reference.MODULES)
def test_every_public_name_has_an_entry(name):
    pytest.importorskip("jax" if name in ("natten.jax", "natten.flax") else "torch")
    if name == "natten.flax":
        pytest.importorskip("flax")
    headings = re.findall(r"^## (.*)$", reference.python_page(name), re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(headings))
    assert sorted(names) == sorted(import_module(name).__all__)


def test_functions_that_differ_in_the_number_of_axes_share_an_entry():
    text = reference.python_page("natten.numpy")
    assert "## `na1d`, `na2d`, `na3d`\n" in text
    assert re.findall(r"Fused .-D", text) == ["Fused 2-D"]


def test_sections_of_docstrings():
    def function(*, size, names=()):
        """Says a * b.

            function(size=3)

        Args:
            size: [batch, *spatial],
                of `x * y`.
            one, two,
            three: names.

        Returns:
            A number.

        Raises:
            ValueError, TypeError: size is wrong.
        """

    assert reference.signature_of("f", function) == "f(*, size, names=())"
    assert reference.markdown_of(reference.inspect.getdoc(function)) == (
        r"""Says a \* b.

```python
function(size=3)
```

**Args**

- `size`: \[batch, \*spatial\], of `x * y`.
- `one, two, three`: names.

**Returns**

A number.

**Raises**

- `ValueError, TypeError`: size is wrong."""
    )


def test_every_header_is_on_the_page():
    page = reference.cpp_page(HEADERS)
    # What only includes others, or defines macros, declares nothing.
    nothing = {"host_device.h", "natten.h"}
    assert set(re.findall(r"^## natten/(.*)$", page, re.MULTILINE)) == {
        path.name for path in HEADERS.glob("*.h") if path.name not in nothing
    }
    exported = "".join(path.read_text() for path in HEADERS.glob("*.h"))
    for name in set(re.findall(r"^NATTEN_EXPORT [\w:<>*& ]+?\b(\w+)\(", exported, re.MULTILINE)):
        assert name == "run_of_rank" or re.search(rf"\b{name}\(", page), name
    assert "NATTEN_EXPORT" not in page and "detail::min" not in page


def test_declarations_without_bodies():
    text = """#pragma once
/// Of the header.
namespace natten {

/// A point.
struct Point {
  int x = 0;  ///< across
  Point() = default;
  Point(int a)
      : x(a) {}
  NATTEN_HOST_DEVICE int twice() const {
    return 2 * x;
  }
};

/// Draws.
NATTEN_EXPORT void draw(const Point& point,
                        int color = {});
NATTEN_EXPORT void clear();

namespace detail {
void hidden();
}  // namespace detail

}  // namespace natten
"""
    assert list(reference._declarations(text)) == [
        ("Of the header.", ""),
        (
            "A point.",
            "struct Point {\n  int x = 0;  ///< across\n  Point() = default;\n  Point(int a);\n"
            "  int twice() const;\n};",
        ),
        ("Draws.", "void draw(const Point& point,\n          int color = {});"),
        ("", "void clear();"),
    ]


def test_every_page_is_in_the_navigation():
    """`make docs` fails otherwise."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = re.findall(r": ([\w.-]+\.md)$", nav, re.MULTILINE)
    for path in (ROOT / "docs").glob("*.md"):
        assert pages.count(path.name) == 1, path.name
    for name in reference.MODULES:
        assert f": reference/{name}.md\n" in nav
