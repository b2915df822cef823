"""Put the recipes and the configs of accelerate into wheels; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Build the packages, and add the recipes to `rlhf_t2i.recipes`."""

    def run(self) -> None:
        """Build; an editable install finds the recipes in the clone."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "rlhf_t2i", "recipes")
            for source, folder in (("recipes", target), ("accelerate_configs", target / "accelerate_configs")):
                shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithRecipes})
