"""Sampling from a policy along a schedule: rollouts, plain generation, and sampling with a gradient.

Search algorithms, which choose among samples, are in `rlhf_t2i.search`.
"""
