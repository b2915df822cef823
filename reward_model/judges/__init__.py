"""Well-known judges under one call: `score(images, prompts)`, differentiable, in float32."""

from reward_model.judges.load import NAMES, is_known, load_judge
from reward_model.judges.pointwise import PointwiseJudge

__all__ = ["NAMES", "PointwiseJudge", "is_known", "load_judge"]
