"""The built-in world: drawn shapes, a small Stable Diffusion that paints them, and an oracle that sees them."""
