"""Teach a judge: LLaVA-Reward (arXiv:2507.21391), a multimodal LLM that says how well a picture serves a prompt."""
