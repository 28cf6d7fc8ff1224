"""The model: networks, harmonisation, losses, inference, metrics, and what may leave a site."""

__version__ = "0.1.0"
