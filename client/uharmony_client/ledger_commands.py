"""`uharmony-client --site X ledger`: what has left this building, shown and checked."""

from __future__ import annotations

from typing import Annotated

import typer

from uharmony_client.home import Home
from uharmony_model.errors import StoreError

app = typer.Typer(no_args_is_help=True, help="What has left this building.")

_SHORT = 120  # characters of values that are shown without being asked for


@app.command()
def show(
    context: typer.Context,
    last: Annotated[int, typer.Option(min=1, help="how many entries")] = 20,
    tensors: Annotated[bool, typer.Option("--tensors", help="each tensor and all values")] = False,
) -> None:
    """Show what has left, newest last."""
    from collections import deque

    from uharmony_client.ledger_check import show as entries

    for entry in deque(entries(Home.find(context.obj).ledger), maxlen=last):
        print(
            f"{entry.seq:>6}  {entry.time}  {entry.kind:<8}  round {entry.round:<4} "
            f"{entry.bytes:>12,} B  {entry.sha256 if tensors else entry.sha256[:16]}"
        )
        values = entry.text or "  ".join(f"{k}={v}" for k, v in entry.values.items())
        if values and (tensors or len(values) <= _SHORT):
            print(f"        {values}")
        elif values:
            print(f"        {len(entry.values)} values; see them with --tensors")
        if entry.tensors and not tensors:
            print(f"        {len(entry.tensors)} tensors")
        for fact in entry.tensors if tensors else ():
            shape = "x".join(map(str, fact.shape))
            print(f"        {fact.name}  {shape}  {fact.dtype}  {fact.bytes:,} B  {fact.sha256}")


@app.command()
def verify(context: typer.Context) -> None:
    """Check every entry, the chain, the signatures and the coordinator's receipts; offline."""
    from uharmony_client.ledger_check import verify as judge
    from uharmony_service.keys import load_ledger_key

    home = Home.find(context.obj)
    verdict = judge(home.ledger, load_ledger_key(home.identity.ledger_key).public_key())
    for problem in verdict.problems:
        print(problem)
    if not verdict.whole:
        raise StoreError(f"{home.ledger}: {len(verdict.problems)} problems in the ledger")
    print(f"{verdict.entries} entries, whole; head {verdict.head.sha256}")
