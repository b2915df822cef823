"""Silence the log messages and progress bars of diffusers and transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_errors() -> Iterator[None]:
    """Silence diffusers and transformers within the context, except for errors."""
    from diffusers.utils import logging as diffusers_logging  # takes seconds
    from transformers.utils import logging as transformers_logging

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"The `local_dir_use_symlinks`")  # for diffusers
            # peft cannot merge into quantised weights; publication merges into plain ones.
            warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
