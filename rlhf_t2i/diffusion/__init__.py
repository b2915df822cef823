"""The maths of one denoising step; knows torch and nothing heavier."""
