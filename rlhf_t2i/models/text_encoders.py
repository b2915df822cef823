"""Frozen text encoders, and a cache of encoded prompts."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reward_model.bounded_steps import bounded_steps
from rlhf_t2i.types import Conditioning

UNCONDITIONAL = "\0unconditional"
"""Key of the unconditional pass's conditioning among encoded prompts."""


class TextEncoder:
    """A tokenizer and a frozen network that encodes its tokens."""

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_length: int | None = None,
        template: Callable[[str], str] = str,
    ) -> None:
        """Pad or truncate prompts to `max_length` tokens; None is the tokenizer's own maximum.

        `template` is applied to a prompt before tokenization, for example a chat template. The network stays where it
        is until the policy moves it to `device`. Raises ValueError for a pipeline that lacks one of the two.
        """
        if tokenizer is None or model is None:
            missing = "tokenizer" if tokenizer is None else "text encoder"
            raise ValueError(
                f"The model has no {missing}, which encodes its prompts; give a pipeline that has all parts."
            )
        self.tokenizer = tokenizer
        self.model: Any = in_precision(model.requires_grad_(False).eval(), dtype)
        self.device = device
        self.max_length: int = max_length or tokenizer.model_max_length
        self._template = template

    def num_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation."""
        return len(self.tokenizer(self._template(prompt), verbose=False).input_ids)

    def tokens(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
        """Return token ids and attention mask, on the network's device."""
        found = self.tokenizer(
            [self._template(prompt) for prompt in prompts],
            padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt",
        )  # fmt: skip
        return found.input_ids.to(self.device), found.attention_mask.to(self.device)

    def penultimate(self, prompts: Sequence[str]) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B ..."]]:
        """Return a CLIP's hidden states before the last layer, and its first output: pooled, if it has a projection."""
        found = self.model(self.tokens(prompts)[0], output_hidden_states=True)
        return found.hidden_states[-2], found[0]


def as_chat(tokenizer: Any, prompt: str, *, thinks: bool) -> str:
    """Return a language model's input: the prompt as a user's message, and the opening of a reply.

    `thinks` is the chat template's switch for a reply that begins with reasoning.
    """
    message = {"role": "user", "content": prompt}
    with bounded_steps("The chat template of this model"):
        return tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True, enable_thinking=thinks
        )


def real_tokens(
    states: Float[Tensor, "B L D"], mask: Int[Tensor, "B L"], *, length: int, skip: int = 0
) -> Conditioning:
    """Return the rows of real tokens after the first `skip` of them, and zeros up to `length` rows, masked."""
    rows = [row[real][skip:] for row, real in zip(states, mask.bool(), strict=True)]
    counts = torch.tensor([len(row) for row in rows], device=states.device)
    padded = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    return Conditioning(padded, mask=torch.arange(length, device=states.device) < counts[:, None])


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """Convert a network to `dtype`, except for layers declared to overflow in float16 (T5's)."""
    in_float32 = (getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if {*in_float32} & {*name.split(".")} else dtype
        if parameter.is_floating_point() and parameter.dtype != wanted:  # weights in 4 bits are bytes
            parameter.data = parameter.data.to(wanted)
    return model


@runtime_checkable
class PromptStore(Protocol):
    """Encoded prompts that outlive a run."""

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts that are not stored."""
        ...

    def get(self, prompt: str) -> Conditioning:
        """Return a stored prompt, a batch of one."""
        ...

    def add(self, encoded: Mapping[str, Conditioning]) -> None:
        """Store prompts, each a batch of one."""
        ...


class PromptCache:
    """Conditioning of recent prompts on the CPU, so that each is encoded once; the oldest are dropped when full.

    Each prompt is encoded in a batch of its own. The result then does not depend on the other prompts of a batch, nor
    on what was cached before a run was interrupted.
    """

    def __init__(self, *, max_bytes: int = 2**30, store: PromptStore | None = None) -> None:
        """What is encoded is also written to `store`, and read from it."""
        self.max_bytes, self.store = max_bytes, store
        self._encoded: OrderedDict[str, Conditioning] = OrderedDict()

    def has(self, prompts: Sequence[str]) -> bool:
        """True if none of these prompts has to be encoded."""
        new = [prompt for prompt in prompts if prompt not in self._encoded]
        return not new if self.store is None else not self.store.missing(new)

    def encode(self, prompts: Sequence[str], encoder: Callable[[Sequence[str]], Conditioning]) -> Conditioning:
        """Return the conditioning of prompts, on the CPU; `encoder` is called for each new one."""
        distinct = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in distinct if prompt not in self._encoded]
        if self.store is not None:
            missing = self.store.missing(missing)
        new = {prompt: encoder([prompt]).to(torch.device("cpu")) for prompt in missing}
        if self.store is not None and new:
            self.store.add(new)
        batch = {
            prompt: new[prompt] if prompt in new else self._encoded.get(prompt) or self._stored(prompt)
            for prompt in distinct
        }
        for prompt, conditioning in batch.items():
            self._encoded[prompt] = conditioning
            self._encoded.move_to_end(prompt)
        while sum(_num_bytes(conditioning) for conditioning in self._encoded.values()) > self.max_bytes:
            self._encoded.popitem(last=False)
        return Conditioning.cat([batch[prompt] for prompt in prompts])

    def _stored(self, prompt: str) -> Conditioning:
        assert self.store is not None
        return self.store.get(prompt)


def _num_bytes(conditioning: Conditioning) -> int:
    return sum(part.nbytes for part in conditioning.parts.values())


class TruncationWarnings:
    """Warnings, one per prompt, about prompts whose end no text encoder gets."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def warn(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> None:
        """Warn of each new prompt that is longer than the longest input of any encoder."""
        longest = max(encoders, key=lambda encoder: encoder.max_length)
        for prompt in dict.fromkeys(prompts):
            if prompt in self._warned or (count := longest.num_tokens(prompt)) <= longest.max_length:
                continue
            self._warned.add(prompt)
            warnings.warn(
                f"The text encoder takes {longest.max_length} tokens and this prompt has {count}; its end is cut off: "
                f"{prompt!r}",
                stacklevel=3,
            )
