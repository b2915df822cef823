"""Human preference data: one module for each published format, all converted to `PreferencePair` and `LabelledImage`.

Also what is done with records before training: splits by prompt, overlap with test sets, hard negatives, a summary.
"""

from reward_model.datasets.fields import BadRecordError
from reward_model.datasets.load import load_records
from reward_model.datasets.same_prompt import load_same_prompt_pairs
from reward_model.datasets.split import split_by_prompt
from reward_model.datasets.summary import describe

__all__ = ["BadRecordError", "describe", "load_records", "load_same_prompt_pairs", "split_by_prompt"]
