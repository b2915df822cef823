"""The loop around updates: trainer, run, run folder, checkpoints, EMA, evaluation, early stopping and metrics.

It imports no report: a recipe passes a function that writes one.
"""
