"""Scorers of other projects (CLIP, PickScore, HPSv2, ImageReward, aesthetics, VQAScore), differentiable, in float32.

One file a scorer, behind `PointwiseScorer.score(images, prompts)`; `load` has the table of names. Soft-TIFA also needs
the rows of the prompts.
"""

from reward_model.scorers.load import NAMES, is_known, load_scorer
from reward_model.scorers.pointwise import PointwiseScorer

__all__ = ["NAMES", "PointwiseScorer", "is_known", "load_scorer"]
