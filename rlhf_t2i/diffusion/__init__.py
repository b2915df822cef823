"""Maths of one diffusion step: forward process, reverse transitions, Gaussian log-probabilities.

Imports torch and nothing heavier.
"""
