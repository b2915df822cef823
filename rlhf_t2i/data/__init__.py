"""Preference pairs for Diffusion-DPO, and the cache of their latents and encoded prompts."""
