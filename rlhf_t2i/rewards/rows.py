"""Checks that the rows of prompts have what rewards need, before a reward or a model is loaded.

A reward, a function or a class, may declare

    required_fields = ("question",)     fields that each row must have, not null
    check_row(metadata)                 a function or static method that raises ValueError for a row that cannot be
                                        used; its text completes "The reward 'NAME' cannot use this row: "
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_t2i.passed import passed
from rlhf_t2i.prompt_rows import Prompt
from rlhf_t2i.rewards.table import find_reward
from rlhf_t2i.rewards.terms import reward_names_of


def check_prompts(rewards: str, prompts: Sequence[str]) -> None:
    """Raise ValueError, with its place, for the first prompt whose row one of comma-separated NAME=WEIGHT cannot use.

    A user's own module is imported, but no reward is loaded. Raises what `find_reward` does for an unknown name.
    """
    for name in reward_names_of(rewards):
        reward = passed().rewards.get(name)
        if reward is None:
            entry, argument = find_reward(name)
            reward = entry.declares(argument)
        check_rows(name, reward, prompts)


def check_rows(name: str, reward: Any, prompts: Sequence[str]) -> None:
    """Raise ValueError, with its place, for the first prompt whose row lacks what a reward declares that it needs."""
    reward = getattr(reward, "function", reward)  # of a CheckedReward
    reward = reward.func if isinstance(reward, partial) else reward
    fields: Sequence[str] = getattr(reward, "required_fields", ())
    check: Callable[[Mapping[str, Any]], None] | None = getattr(reward, "check_row", None)
    if isinstance(fields, str):
        raise ValueError(f"The reward {name!r} has the required_fields {fields!r}; it must be a list of names.")
    if not fields and check is None:
        return
    for index, prompt in enumerate(prompts):
        row = prompt.metadata if isinstance(prompt, Prompt) else {"prompt": prompt}
        where = (prompt.where if isinstance(prompt, Prompt) else "") or f"prompt {index}"
        if missing := [field for field in fields if row.get(field) is None]:
            raise ValueError(
                f"{where} has no {missing[0]!r}, which the reward {name!r} needs; its fields are "
                f"{', '.join(map(repr, row))}. Its prompt is {str(prompt)!r}."
            )
        if check is not None:
            try:
                check(row)
            except ValueError as error:
                raise ValueError(f"{where}: the reward {name!r} cannot use this row: {error}") from error
