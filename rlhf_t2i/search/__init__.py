"""Inference-time search (best-of-N, pruning, FK steering, noise search) and its Python API."""
