"""From prompts to token ids: the family's own chat template, one place for the image, one last token to pool."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class PromptTokenizer:
    """How one family of models is shown an image and a prompt."""

    tokenizer: Any
    image_token_id: int
    chat_template: str
    max_length: int
    """Tokens that the language model has positions for."""
    padding_side: PaddingSide = "right"
    answering: bool = False
    """End where the model's own turn begins, so that its next word is an answer; else with one token to pool."""
    written_image: str | None = None
    """Where an image has no token in the text: how it is written there, in the one string that the template gets.

    What stands before it and behind it is then tokenised apart, each half as a text of its own.
    """

    def __call__(self, prompts: Sequence[str], num_image_tokens: Sequence[int]) -> dict[str, Int[Tensor, "B L"]]:
        """`input_ids` and `attention_mask`, padded; row i has num_image_tokens[i] places for visual tokens.

        Raises ValueError for a prompt that holds a special token of the model, or is too long.
        """
        rows = [self.ids(prompt, count) for prompt, count in zip(prompts, num_image_tokens, strict=True)]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.padding_id)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if self.padding_side == "right" else slice(length - len(row), length)
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}

    def ids(self, prompt: str, num_image_tokens: int) -> list[int]:
        """The token ids of one row, without padding."""
        text = self.text(prompt)
        halves = [text] if self.written_image is None else text.split(self.written_image)
        ids = self._tokenised(halves[0])
        for half in halves[1:]:
            ids += [self.image_token_id, *self._tokenised(half)]
        if not self.answering and ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
        if ids.count(self.image_token_id) != 1:
            raise ValueError(
                f"The chat template makes {ids.count(self.image_token_id)} places for one image; rendered: {text!r}."
            )
        at = ids.index(self.image_token_id)
        ids = [*ids[:at], *[self.image_token_id] * num_image_tokens, *ids[at + 1 :]]
        if len(ids) > self.max_length:
            raise ValueError(
                f"The prompt {_short(prompt)!r} and its image take {len(ids)} tokens ({num_image_tokens} of them the "
                f"image's); this model has places for {self.max_length}."
            )
        return ids

    def _tokenised(self, text: str) -> list[int]:
        starts_itself = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not starts_itself)["input_ids"]

    def text(self, prompt: str) -> str:
        """What the model is shown, with the image as one token: the chat template's user turn."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        for token in [*special, self.written_image]:
            if token is not None and token in prompt:
                raise ValueError(f"The prompt {_short(prompt)!r} holds {token!r}, a special token of this model.")
        content: Any = [{"type": "image"}, {"type": "text", "text": prompt}]
        if self.written_image is not None:
            content = f"{self.written_image}\n{prompt}"
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=self.answering,
        )
        return text if self.answering else text.rstrip()

    @property
    def padding_id(self) -> int:
        """Padding is masked everywhere, so any token would do that is not the image's."""
        own = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if own is None or own == self.image_token_id else own


def find_chat_template(source: str, tokenizer: Any) -> str:
    """The family's own template, from the tokenizer or beside it; ValueError if the model comes without one."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    from transformers.utils.hub import cached_file

    for name in ("chat_template.jinja", "chat_template.json"):
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path:
            text = Path(path).read_text(encoding="utf-8")
            return text if name.endswith("jinja") else json.loads(text)["chat_template"]
    raise ValueError(f"The model {source!r} has no chat template, so it is not known how to show it a prompt.")


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else prompt[:77] + "..."
