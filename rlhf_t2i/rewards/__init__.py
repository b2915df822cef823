"""Rewards: functions from images and prompts to scores.

Here belong the table of reward names, the built-in rewards, and adapters for reward models, scorers and servers.
"""
