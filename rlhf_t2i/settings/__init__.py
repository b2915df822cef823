"""The options of every command: types, ranges, defaults and help.

One file a command and `groups.py` for what they share; nothing here imports torch, so that `--help` is quick.
"""
