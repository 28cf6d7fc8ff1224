"""Aggregation of ten sites' updates against the one-read bound and Flower's own function."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from benchmarks.rows import Row, interleaved
from uharmony_server.aggregate import WeightedSum

SITES, NUMEL = 10, 30_000_000


def rows() -> list[Row]:
    """The bound is one read of every update and one write, at this machine's copy speed."""
    base = torch.randn(NUMEL)
    updates = [torch.randn(NUMEL) for _ in range(SITES)]
    target = torch.empty(NUMEL)

    def ours() -> None:
        total = WeightedSum(NUMEL)
        total.add(updates, [float(n + 1) for n in range(SITES)])
        total.apply(base)

    times = interleaved({"copy": lambda: target.copy_(base), "ours": ours}, repeats=5)
    # A copy moves two arrays; the bound moves every update, the base and the result.
    bound = times["copy"] * (SITES + 2) / 2
    records = [
        RecordDict(
            {
                "a": ArrayRecord({str(i): u for i, u in enumerate(update.split(NUMEL // 40))}),
                "m": MetricRecord({"num-examples": n + 1}),
            }
        )
        for n, update in enumerate(updates)
    ]
    flower = interleaved(
        {"flower": lambda: aggregate_arrayrecords(records, "num-examples")}, repeats=2, warmup=0
    )["flower"]
    ratio = times["ours"] / bound
    return [
        Row(
            "aggregation, 10 x 30 M, v. one-read bound",
            round(times["ours"], 1),
            "ms",
            round(ratio, 2),
            "<= 1.5x",
            ratio <= 1.5,
        ),
        Row(
            "aggregation, 10 x 30 M, v. Flower's function",
            round(times["ours"], 1),
            "ms",
            round(times["ours"] / flower, 3),
            "< 1x",
            times["ours"] < flower,
        ),
    ]
