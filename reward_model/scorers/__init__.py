"""Well-known judges under one call: `score(images, prompts)`, differentiable, in float32."""

from reward_model.scorers.load import NAMES, is_known, load_scorer
from reward_model.scorers.pointwise import PointwiseScorer

__all__ = ["NAMES", "PointwiseScorer", "is_known", "load_scorer"]
