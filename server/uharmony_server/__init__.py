"""The coordinator: rounds, admission, aggregation, checkpoints, records and the report."""
