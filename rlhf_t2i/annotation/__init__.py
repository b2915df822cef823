"""Preferences of people between two images of a prompt.

Here belong the questions, the web page that shows them, the answers on disk, and the measures of agreement.
"""
