"""Pretraining of LLaMA models with sparse plus low-rank weights (SLTrain, arXiv 2406.02214)."""

__version__ = "0.1.0"
