"""Alignment of an unlabelled modality, after the abstract of Su et al. 2022 (arXiv:2205.11888)."""
