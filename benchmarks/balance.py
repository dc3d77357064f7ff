"""How evenly the work of the cases is shared by threads, counted from the plan, without timing.

    python benchmarks/balance.py [--cases CASE ...] [--threads 1 2 4 8 16 32 64 128]

Prints, for each case and pass, how many units of work there are and the balance: the work of a
thread on average by that of the one that has most, threads taking chunks of units as they get free
(natten::PassWork). Needs no tensors and no more cores than one.
"""

from __future__ import annotations

from cases import Case, Row, cases_named, parser_of

from natten import _core
from natten._args import make_config

OPS = {
    "attention_forward": (["query", "key", "value"], ["output"]),
    "attention_backward": (
        ["query", "key", "value", "logsumexp", "grad_output"],
        ["grad_query", "grad_key", "grad_value"],
    ),
}


def passes_of(case: Case, dtype: str, threads: int) -> list[Row]:
    """Of the forward and the backward pass, without biases, which the library does not count."""
    config = make_config(
        len(case.grid), case.kernel, case.dilation, case.is_causal, case.stride, case.boundary
    )
    tensor, statistic = (case.shapes[0], dtype), (case.shapes[0][:-1], "float32")
    rows = []
    for op, (given, wanted) in OPS.items():
        inputs, outputs = (
            [
                (statistic if role[4] else tensor) if role[0] in names else None
                for role in _core.roles(op)
                if role[2] == is_output
            ]
            for names, is_output in ((given, False), (wanted, True))
        )
        rows += _core.work_of(op, config, inputs, outputs, "cpu", threads)
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[2**i for i in range(8)])
    args = parser.parse_args()
    for case in cases_named(args.cases):
        counted = [passes_of(case, args.dtypes[0], threads) for threads in args.threads]
        for rows in zip(*counted, strict=True):
            cells = (f"{row['units']:6} {row['balance']:.2f}" for row in rows)
            print(f"{case.name:17} {rows[0]['name']:14}", *cells, sep=" |", flush=True)


if __name__ == "__main__":
    main()
