"""People's preferences: questions of two images, a page that asks them, answers on the disk, and who agrees."""
