"""Prompts to token ids: chat template, placeholders of the image's visual tokens, and a last token to pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from reward_model.bounded_steps import bounded_steps
from reward_model.text_files import read_object

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class PromptTokenizer:
    """The tokenizer, chat template and limits with which one model takes an image and a prompt."""

    tokenizer: Any
    image_token_id: int
    chat_template: str
    max_length: int
    """Maximum number of tokens in a row."""
    padding_side: PaddingSide = "right"
    answering: bool = False
    """True: end with the start of the model's turn, whose next token is an answer. False: end with a token to pool."""
    image_text: str | None = None
    """The image's placeholder in the text, for templates that take one string; None if the image has a token.

    The text before and behind it is tokenised separately.
    """

    def __call__(self, prompts: Sequence[str], num_image_tokens: Sequence[int]) -> dict[str, Int[Tensor, "B L"]]:
        """Return padded `input_ids` and `attention_mask`; row i has num_image_tokens[i] placeholders of visual tokens.

        Raises ValueError for a prompt that contains a special token of the model, or is too long.
        """
        rows = [self.ids(prompt, count) for prompt, count in zip(prompts, num_image_tokens, strict=True)]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.padding_id)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            columns = slice(0, len(row)) if self.padding_side == "right" else slice(length - len(row), length)
            ids[i, columns], mask[i, columns] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}

    def ids(self, prompt: str, num_image_tokens: int) -> list[int]:
        """Return the token ids of one row, without padding."""
        text = self.text(prompt)
        halves = [text] if self.image_text is None else text.split(self.image_text)
        ids = self._tokenise(halves[0])
        for half in halves[1:]:
            ids += [self.image_token_id, *self._tokenise(half)]
        if not self.answering and ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
        if (count := ids.count(self.image_token_id)) != 1:
            raise ValueError(f"The chat template has {count} placeholders for one image; rendered: {text!r}.")
        at = ids.index(self.image_token_id)
        ids = [*ids[:at], *[self.image_token_id] * num_image_tokens, *ids[at + 1 :]]
        if len(ids) > self.max_length:
            raise ValueError(
                f"The prompt {_short(prompt)!r} and its image take {len(ids)} tokens ({num_image_tokens} of them the "
                f"image's); the maximum of this model is {self.max_length}."
            )
        return ids

    def _tokenise(self, text: str) -> list[int]:
        has_bos = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not has_bos)["input_ids"]

    def text(self, prompt: str) -> str:
        """Return the chat template's user turn, with the image as one token."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        for token in [*special, self.image_text]:
            if token is not None and token in prompt:
                raise ValueError(f"The prompt {_short(prompt)!r} contains {token!r}, a special token of this model.")
        content: Any = [{"type": "image"}, {"type": "text", "text": prompt}]
        if self.image_text is not None:
            content = f"{self.image_text}\n{prompt}"
        with bounded_steps("The chat template of this model"):
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=self.answering,
            )
        return text if self.answering else text.rstrip()

    @property
    def padding_id(self) -> int:
        """The padding token; padding is masked, so any token serves that is not the image's."""
        own = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if own is None or own == self.image_token_id else own


def find_chat_template(source: str, tokenizer: Any) -> str:
    """Return the model's chat template, from the tokenizer or a file beside it; ValueError if there is none."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    from transformers.utils.hub import cached_file

    for name in ("chat_template.jinja", "chat_template.json"):
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path:
            file = Path(path)
            found = file.read_text("utf-8") if name.endswith("jinja") else read_object(file).get("chat_template")
            if not isinstance(found, str):
                raise ValueError(f"{file} has no text under chat_template.")
            return found
    raise ValueError(f"The model {source!r} has no chat template.")


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else prompt[:77] + "..."
