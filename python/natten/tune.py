"""Tunes recorded problems:

    NATTEN_TUNE=record python model.py                  # writes the problems that it meets
    NATTEN_CACHE_DIR=tuned python -m natten.tune problems.json
    NATTEN_CACHE_DIR=tuned NATTEN_TUNE=read python model.py

and puts records, or folders of choices, of several machines together:

    python -m natten.tune --merge all.json problems-a.json problems-b.json
    python -m natten.tune --merge tuned tuned-a tuned-b
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from natten import _core
from natten._files import write_whole
from natten.context import tell_tuning_notes

_CHOICES = "natten-*.choice"
_DEVICES = ("cpu", "cuda")


class Record(NamedTuple):
    """A problem that was met, and the threads that it ran on; 0 on a GPU."""

    problem: str
    threads: int

    @property
    def words(self) -> list[str]:
        return self.problem.split()

    @property
    def device(self) -> str:
        return self.words[2]

    def __str__(self) -> str:
        """As "forward float32 14x14, kernel 7x7, 1x4 heads of 32, 2 threads"."""
        operation, dtype = self.words[:2]
        pairs = [word.partition("=")[::2] for word in self.words[3:]]
        numbers = dict(pairs)
        axes = {
            name: [int(v) for n, v in pairs if n == name] for name in ("queries", "kernel_size")
        }
        grid, kernel = ("x".join(map(str, v[-int(numbers["rank"]) :])) for v in axes.values())
        extras = [
            f"{name} {'x'.join(values)}"
            for name in ("stride", "dilation")
            if set(values := [v for n, v in pairs if n == name][-int(numbers["rank"]) :]) != {"1"}
        ]
        causal = ["causal"] if any(n == "causal" and v == "1" for n, v in pairs) else []
        heads = f"{numbers['batch']}x{numbers['heads']} heads of {numbers['head_dim']}"
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        where = threads if self.device == "cpu" else self.device
        operation = operation.removeprefix("attention_")
        parts = [f"kernel {kernel}", *extras, *causal, heads, where]
        return f"{operation} {dtype} {grid}, {', '.join(parts)}"


class RecordError(ValueError):
    """A file that does not hold records of this version."""


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The problems of a file that NATTEN_TUNE=record has written, each once.

    Raises:
        RecordError: naming the file and the line, where something else is written, or what another
            version wrote.
        OSError: the file cannot be read.
    """
    records: dict[Record, None] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{os.fspath(path)}, line {number}"
            try:
                row = json.loads(line)
                version, record = row["natten"], Record(row["problem"], row["threads"])
                if not isinstance(record.problem, str) or type(record.threads) is not int:
                    raise TypeError
                if record.device not in _DEVICES:
                    raise ValueError
            except (ValueError, LookupError, TypeError):
                raise RecordError(f"{where}: is no record of a problem") from None
            if version != _core.version:
                raise RecordError(
                    f"{where}: was recorded by natten {version}; this is natten {_core.version}, "
                    "whose problems may differ: record it again"
                )
            try:
                str(record)
            except (KeyError, IndexError, ValueError):
                raise RecordError(f"{where}: is no record of a problem") from None
            records[record] = None
    return list(records)


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Writes records, whole or not at all."""
    rows = (
        {"natten": _core.version, "threads": record.threads, "problem": record.problem}
        for record in records
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def merge(target: str, sources: Sequence[str]) -> str:
    """Puts files of records into one file, or folders of choices into one folder; returns what was
    done, in words.

    Of choices for the same problem and machine the one that was written last is taken.

    Raises:
        RecordError: files and folders are mixed, or as `read_records`.
        OSError: a file cannot be read or written.
    """
    folders = [source for source in sources if os.path.isdir(source)]
    if not folders:
        records = list(dict.fromkeys(r for source in sources for r in read_records(source)))
        write_records(target, records)
        return f"{len(records)} problems in {target}"
    if len(folders) != len(sources):
        other = next(source for source in sources if source not in folders)
        raise RecordError(f"{other}: is no folder, as {folders[0]} is; must be all of one kind")
    found = [file for folder in folders for file in Path(folder).glob(_CHOICES)]
    newest = {file.name: file for file in sorted(found, key=lambda file: file.stat().st_mtime)}
    to = Path(target)
    to.mkdir(parents=True, exist_ok=True)
    for name, file in newest.items():
        if (to / name).exists() and (to / name).stat().st_mtime >= file.stat().st_mtime:
            continue
        write_whole(to / name, functools.partial(shutil.copy2, file))
    return f"{len(list(to.glob(_CHOICES)))} choices in {target}"


class Row(NamedTuple):
    """What came of a problem."""

    record: Record
    configuration: str
    origin: str
    default_seconds: float  # 0: it was not timed
    seconds: float


def tune(records: Sequence[Record], again: bool = False, progress: bool = True) -> list[Row]:
    """Tunes problems of the CPU, on the threads that they were recorded with, one after another."""
    rows = []
    threads = _core.num_threads()
    for i, record in enumerate(records):
        if progress:
            _show_progress(i, len(records), str(record))
        if record.threads > 0:
            _core.set_num_threads(record.threads)
        try:
            rows.append(Row(record, *_core.tune_problem(record.problem, again)))
        finally:
            _core.set_num_threads(threads)
        tell_tuning_notes()
    if progress:
        _show_progress(len(records), len(records), "")
    return rows


def _show_progress(done: int, count: int, what: str) -> None:
    width = 20
    bar = "#" * (width * done // max(count, 1))
    text = f"[{bar:.<{width}}] {done}/{count} {what}"
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns - 1
        end = "\n" if done == count else ""
        print(f"\r{text[:columns]:{columns}}", end=end, file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Row]) -> str:
    """A line for each problem: milliseconds of the default and of the choice, and the gain."""
    cells = [("problem", "default", "best", "gain", "configuration")]
    for row in rows:
        if row.default_seconds <= 0:
            note = " (nothing to try)" if row.origin else ""
            cells.append((str(row.record), "-", "-", "-", row.configuration + note))
            continue
        gain = row.default_seconds / row.seconds - 1
        default, best = (f"{1e3 * s:.3f} ms" for s in (row.default_seconds, row.seconds))
        note = " (known already)" if row.origin == "cache" else ""
        cells.append((str(row.record), default, best, f"{gain:+.1%}", row.configuration + note))
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    return "\n".join(
        f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}"
        for a, b, c, d, e in cells
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m natten.tune",
        description="Times the configurations of recorded problems and keeps the fastest.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="what NATTEN_TUNE=record wrote")
    parser.add_argument("--cache-dir", help="folder of the choices (default: NATTEN_CACHE_DIR)")
    parser.add_argument("--seconds", type=float, help="for each problem; default 2, thorough 10")
    parser.add_argument("--thorough", action="store_true", help="try more configurations")
    parser.add_argument("--again", action="store_true", help="also what is known already")
    parser.add_argument(
        "--merge",
        metavar="TARGET",
        help="only put the files, or folders of choices, together in TARGET",
    )
    options = parser.parse_args(arguments)
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        parser.error(f"--seconds: got {options.seconds:g}; must be positive")
    try:
        if options.merge:
            print(merge(options.merge, options.files))
            return 0
        records = list(dict.fromkeys(r for path in options.files for r in read_records(path)))
    except (RecordError, OSError) as error:
        print(f"natten.tune: {error}", file=sys.stderr)
        return 1
    seconds = options.seconds or (10.0 if options.thorough else 2.0)
    limits = (5, 5, seconds, options.thorough)
    _core.set_tuning("read", "read", limits, limits, options.cache_dir)
    if not _core.tuning()[2]:
        print(
            "natten.tune: no folder for the choices (--cache-dir or NATTEN_CACHE_DIR); they are "
            "shown and then lost",
            file=sys.stderr,
        )
    here = [record for record in records if record.device == "cpu"]
    others = [record for record in records if record.device != "cpu"]
    try:
        rows = tune(here, options.again)
    except ValueError as error:  # a line that describes no problem
        print(f"natten.tune: {error}", file=sys.stderr)
        return 1
    print(table([*rows, *(Row(record, "not tuned", "", 0.0, 0.0) for record in others)]))
    if others:
        devices = ", ".join(sorted({record.device for record in others}))
        print(
            f"natten.tune: {len(others)} of {len(records)} problems are not tuned, those of "
            f"{devices}: offline only problems of the CPU are; run the program itself on that "
            "device under NATTEN_TUNE=tune",
            file=sys.stderr,
        )
    return 1 if others and not here else 0


if __name__ == "__main__":
    sys.exit(main())
