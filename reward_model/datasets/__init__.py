"""What people preferred: one reader for each format, all of which answer with pairs and labels."""

from reward_model.datasets.fields import BadRecordError
from reward_model.datasets.load import load_records
from reward_model.datasets.one_prompt import load_pairs_of_one_prompt
from reward_model.datasets.split import split_by_prompt
from reward_model.datasets.summary import describe

__all__ = ["BadRecordError", "describe", "load_pairs_of_one_prompt", "load_records", "split_by_prompt"]
