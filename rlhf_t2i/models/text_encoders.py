"""Frozen text encoders, and prompts that they have read."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class TextEncoder:
    """A tokenizer and the frozen network that reads its tokens."""

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_length: int | None = None,
        wrap: Callable[[str], str] = str,
    ) -> None:
        """Prompts are padded or cut to `max_length` tokens; None is as many as the tokenizer says.

        `wrap` makes of a prompt what is read, such as the turn of a chat.
        """
        self.tokenizer = tokenizer
        self.model: Any = _in_precision(model.requires_grad_(False).to(device).eval(), dtype)
        self.device = device
        self.max_length: int = max_length or tokenizer.model_max_length
        self._wrap = wrap

    def num_tokens(self, prompt: str) -> int:
        """How many tokens a prompt has, uncut."""
        return len(self.tokenizer(self._wrap(prompt), verbose=False).input_ids)

    def tokens(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
        """Token numbers and attention mask, on the network's device."""
        found = self.tokenizer(
            [self._wrap(prompt) for prompt in prompts],
            padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt",
        )  # fmt: skip
        return found.input_ids.to(self.device), found.attention_mask.to(self.device)

    def penultimate(self, prompts: Sequence[str]) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B ..."]]:
        """The states before a CLIP's last layer, and what it gives first: the summary, if it has a projection."""
        found = self.model(self.tokens(prompts)[0], output_hidden_states=True)
        return found.hidden_states[-2], found[0]


def _in_precision(model: Any, dtype: torch.dtype) -> Any:
    """A network in `dtype`, but for layers that say they overflow in half precision (of T5)."""
    in_float32 = (getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if {*in_float32} & {*name.split(".")} else dtype)
    return model


class Memory:
    """What was read of prompts, so that each is read once; the oldest go when there is no room.

    A prompt is read alone. What it becomes then does not depend on its neighbours, nor on what was read before a stop.
    """

    def __init__(self, *, max_bytes: int = 2**30) -> None:
        self.max_bytes = max_bytes
        self._states: OrderedDict[str, Tensor] = OrderedDict()

    def knows(self, prompts: Sequence[str]) -> bool:
        """Whether nothing of this has to be read."""
        return all(prompt in self._states for prompt in prompts)

    def read(self, prompts: Sequence[str], by: Callable[[Sequence[str]], Tensor]) -> Float[Tensor, "B L D"]:
        """States of prompts, on the CPU; those that are new are read by `by`."""
        asked: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(prompts):
            asked[prompt] = self._states[prompt] if prompt in self._states else by([prompt])[0].cpu()
        for prompt, states in asked.items():
            self._states[prompt] = states
            self._states.move_to_end(prompt)
        while sum(states.nbytes for states in self._states.values()) > self.max_bytes:
            self._states.popitem(last=False)
        return torch.stack([asked[prompt] for prompt in prompts])


class CutWarnings:
    """Warns once of each prompt whose end no text encoder reads."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def look(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> None:
        longest = max(encoders, key=lambda encoder: encoder.max_length)
        for prompt in dict.fromkeys(prompts):
            if prompt in self._warned or (count := longest.num_tokens(prompt)) <= longest.max_length:
                continue
            self._warned.add(prompt)
            warnings.warn(
                f"The text encoder reads {longest.max_length} tokens and this prompt has {count}; its end is cut off: "
                f"{prompt!r}",
                stacklevel=3,
            )


def with_summary(states: Float[Tensor, "B L D"], summary: Float[Tensor, "B E"]) -> Float[Tensor, "B L1 W"]:
    """States of tokens and the summary of a prompt as one tensor: the summary is the last row, zeros fill up."""
    width = max(states.shape[-1], summary.shape[-1])
    rows = [F.pad(part, (0, width - part.shape[-1])) for part in (states, summary[:, None].to(states.dtype))]
    return torch.cat(rows, dim=1)


def without_summary(
    conditioning: Float[Tensor, "B L1 W"], *, width: int, summary_width: int
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B E"]]:
    """What `with_summary` was given, of these widths."""
    return conditioning[:, :-1, :width], conditioning[:, -1, :summary_width]
