"""Who paints: the only folder that knows diffusers."""
