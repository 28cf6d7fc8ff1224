"""What the parts cost, each beside its peer in one run: `python -m benchmarks`."""
