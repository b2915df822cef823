"""The toy world: scenes of coloured shapes and their prompts, an oracle that knows the true reward, and small models.

`names` is the only module of the project that knows the name "shapes"; the builders train the models from scratch.
"""
