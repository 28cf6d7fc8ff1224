"""The site: its data, its training, the parameters that never leave, and prediction."""
