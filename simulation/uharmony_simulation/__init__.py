"""The federation in one process: simulated scanners, arms, and the studies that compare them."""
