"""How good is an image? Built-in rewards, and the door for any Python callable."""
