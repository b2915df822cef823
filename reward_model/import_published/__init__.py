"""Import of checkpoints that the published LLaVA-Reward code wrote: their files, their names, their quirks.

`python -m reward_model.import_published` is the command.
"""
