"""Measure what a message costs on portico, beside its peers and the limit.

One command runs every server on the same core in the same minutes and prints ratios:

    python -m benchmarks run          every work on every server; keeps the results (the default)
    python -m benchmarks compare      two servers side by side, for a difference of a percent
    python -m benchmarks events       what an event costs that nobody subscribed to

`works` says what is measured, `peers` on which servers; `rounds` interleaves and summarises;
`report` and `plot` write down.  Below them are `process` (one running server), `loads` (what is
put on it) and `toolchain` (what has to be compiled first); `machine` knows the cores.
`side_by_side` and `events_cost` are the other two commands.
"""
