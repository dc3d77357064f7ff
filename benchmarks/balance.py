"""How evenly the work of the cases is shared by threads, counted from the plan, without timing.

    python benchmarks/balance.py [--cases CASE ...] [--threads 1 2 4 8 16 32 64 128]

Prints, for each case and pass, how many units of work there are and the balance: the work of a
thread on average by that of the one that has most, threads taking chunks of units as they get free
(natten::PassWork). Needs no tensors and no more cores than one.
"""

from __future__ import annotations

from cases import Case, Row, cases_named, parser_of

from natten._simulate import make_layer


def passes_of(case: Case, dtype: str, threads: int) -> list[Row]:
    """Of the forward and the backward pass, without biases, which the library does not count."""
    layer = make_layer(
        case.grid, case.kernel, case.stride, case.dilation, case.is_causal, case.boundary,
        case.batch, case.heads, case.head_dim, dtype,
    )  # fmt: skip
    return [
        row
        for op in ("attention_forward", "attention_backward")
        for row in layer.work(op, "cpu", threads)
    ]


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
