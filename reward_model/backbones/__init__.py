"""Who reads the picture: one adapter for each family of multimodal LLMs."""
