"""Benchmark: what pic-rag costs and saves, in latency, memory and break-even, beside what users would pick instead.

`suite` is the grid, `workload` the questions, `cases`, `compression` and `splice` are what is timed with the clocks
of `measure`; `runner` repeats them, `report` and `plot` show the result. This room does not know whether an answer is
right.
"""
