"""Who paints: the only folder that knows diffusers."""

import os

# Without torchvision, which nothing here needs, transformers remarks on every image processor it imports.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
