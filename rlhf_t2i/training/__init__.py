"""The loop around updates: trainer, run, run folder, checkpoints, EMA, evaluation, early stopping and metrics."""
