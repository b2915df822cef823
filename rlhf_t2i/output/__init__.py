"""What a run writes: the layout of its folder, files that are whole or absent, image grids and tables of text.

Here belongs what several parts write alike; it knows torch and Pillow, and neither models nor training.
"""
