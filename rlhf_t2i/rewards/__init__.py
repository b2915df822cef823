"""How good is a picture? Built-in rewards, and the door for any Python callable."""
