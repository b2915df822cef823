"""Teach text-to-image diffusion models what people prefer."""
