"""Diffusion models as policies: one base class, one file a family.

Together with the builders of the toy world the only package that knows diffusers and peft.
"""

import os

# Without torchvision, which nothing here needs, transformers warns about every image processor it imports.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
