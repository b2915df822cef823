"""Who reads the image: one adapter for each family of multimodal LLMs."""
