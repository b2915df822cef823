"""People's preferences: questions of two pictures, a page that asks them, answers on the disk, and who agrees."""
