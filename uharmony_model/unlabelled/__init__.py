"""Learning from cases without labels: UST-RUN (Ma et al. 2025, arXiv:2505.24567) in pieces."""
