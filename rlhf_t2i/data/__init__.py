"""Prompts, and preference pairs for Diffusion-DPO with the cache of their latents and encoded prompts."""
