"""Training of a reward model while preferences arrive, with replay of all earlier ones and an ensemble of heads.

The members of the ensemble share the backbone, with its LoRA and projector, and so one forward pass. Each has a SkipCA
and a head of its own, and weighs every record by an own draw from a Poisson distribution with mean 1 (online bootstrap;
Oza and Russell, 2001). Where members disagree the preferences seen so far do not decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_model.checkpoint import adapter_tensors
from reward_model.config import RewardModelConfig
from reward_model.images import to_tensor
from reward_model.losses import label_losses, preference_losses
from reward_model.model import Perspective, RewardModel
from reward_model.types import BackboneOutput, Inputs, LabelledImage, PreferencePair, Record

_BETAS, _MAX_GRADIENT_NORM = (0.9, 0.95), 1.0


class OnlineRewardModel:
    """A reward model whose scores are the mean of its members, and which learns from a growing list of records."""

    def __init__(
        self, model: RewardModel, *, num_members: int, groups: Sequence[str], learning_rate: float, batch_size: int,
        tie_width: float, seed: int,
    ) -> None:  # fmt: skip
        """Train `groups` of the active perspective, and SkipCA and head of the other members, with `learning_rate`.

        A batch has at most `batch_size` records, drawn from all. Members start alike if the perspective is trained
        already, and from random weights if it is not (its head is at its initial scale). Raises ValueError without a
        head, and for one without scores.
        """
        config = model.configs[model.active]
        if config.head != "scalar":
            raise ValueError(
                f"The reward model has a {config.head.replace('_', '-')} head, which compares two images but gives no "
                f"score to one; votes teach a scalar head."
            )
        if config.readout != "last_token":
            raise ValueError(
                f"The reward model's readout is {config.readout}, which has no head; votes teach a head. Give a reward "
                f"model whose readout is last_token."
            )
        self.model, self.groups, self.batch_size, self.seed = model.eval(), tuple(groups), batch_size, seed
        self.config, self.tie_width = config, max(tie_width, config.tie_width)
        self.members = [config.perspective, *(f"member_{i}" for i in range(1, num_members))]
        self.num_updates = self.num_records = 0
        self._owed = 0.0  # optimiser steps for records that came, in fractions
        _add_members(model, self.members, config, seed=seed)
        model.set_trainable(self.groups)
        for name in self.members[1:]:
            model.perspectives[name].requires_grad_(True)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=learning_rate, betas=_BETAS, weight_decay=0.0)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> OnlineRewardModel:
        """Move the model, and the state of its optimiser, to a device; return it."""
        self.model.to(device)
        for state in self._optimizer.state.values():
            state.update({key: one.to(device) for key, one in state.items() if isinstance(one, Tensor) and one.dim()})
        return self

    @torch.no_grad()
    def scores(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], *, batch_size: int
    ) -> Float[Tensor, "E B"]:
        """Return the score of each image by each member, in float32."""
        parts: list[Tensor] = []
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            inputs = self.model.backbone.prepare((image.to(self.device) for image in images[rows]), prompts[rows])
            parts.append(self._member_scores(inputs))
        return torch.cat(parts, dim=1)

    def log_odds(self, first: Float[Tensor, "E P"], second: Float[Tensor, "E P"]) -> Float[Tensor, "E P"]:
        """Return each member's log-odds that the first image is preferred, from the scores of both."""
        return (first - second) / self.config.temperature

    def learn_new(self, records: Sequence[Record], *, updates_per_record: float) -> dict[str, float]:
        """Take `updates_per_record` optimiser steps for each record that is new since the last call; see `learn`."""
        num_new, self.num_records = len(records) - self.num_records, len(records)
        self._owed += updates_per_record * max(num_new, 0)
        num_updates = int(self._owed)
        self._owed -= num_updates
        return self.learn(records, num_updates=num_updates)

    def learn(self, records: Sequence[Record], *, num_updates: int) -> dict[str, float]:
        """Take optimiser steps on batches of all records; return the mean loss and accuracy on them.

        Ties and labels have no accuracy. Which records a step sees depends on the seed, the number of steps taken
        before and the number of records only.
        """
        losses, correct = list[float](), list[float]()
        for _ in range(num_updates if records else 0):
            rng = np.random.default_rng((self.seed, 0, self.num_updates))
            count = min(self.batch_size, len(records))
            chosen = rng.choice(len(records), size=count, replace=False).tolist()
            loss, hits = self._loss([records[i] for i in chosen], self._weights(chosen))
            self._optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self._trained, _MAX_GRADIENT_NORM)
            self._optimizer.step()
            self.num_updates += 1
            losses.append(loss.item())
            correct += hits
        found = {"loss": losses, "accuracy": correct}
        return {name: float(np.mean(values)) for name, values in found.items() if values}

    def _loss(self, records: Sequence[Record], weights: Float[Tensor, "E N"]) -> tuple[Float[Tensor, ""], list[float]]:
        """Return the weighted mean loss of all members, and for each decided pair 1 if their mean is right, else 0."""
        pairs = [(i, one) for i, one in enumerate(records) if isinstance(one, PreferencePair)]
        labelled = [(i, one) for i, one in enumerate(records) if isinstance(one, LabelledImage)]
        rows = [(one.winner, one.winner_prompt) for _, one in pairs] + [
            (one.loser, one.loser_prompt) for _, one in pairs
        ]
        rows += [(one.image, one.prompt) for _, one in labelled]
        images = (to_tensor(source).to(self.device) for source, _ in rows)
        scores = self._member_scores(self.model.backbone.prepare(images, [prompt for _, prompt in rows]))
        winners, losers, others = scores.split([len(pairs), len(pairs), len(labelled)], dim=1)
        tie = torch.tensor([one.tie for _, one in pairs], dtype=torch.bool, device=scores.device)
        logits = self.log_odds(winners, losers)
        width = self.tie_width if tie.any() else 0.0
        own = [preference_losses(one, tie, tie_width=width) for one in logits]
        labels = torch.tensor([float(one.label) for _, one in labelled], device=scores.device)
        own = [
            torch.cat([loss, label_losses(one / self.config.temperature, labels)])
            for loss, one in zip(own, others, strict=True)
        ]
        order = [i for i, _ in pairs] + [i for i, _ in labelled]
        weights = weights[:, order].to(scores.device)
        loss = (torch.stack(own) * weights).sum() / weights.sum().clamp_min(1.0)
        return loss, (logits.mean(0) > 0)[~tie].float().tolist()

    def _weights(self, records: Sequence[int]) -> Float[Tensor, "E N"]:
        """Return each member's weight of some records: 1 if there is one member, else its own Poisson draw."""
        if len(self.members) == 1:
            return torch.ones(1, len(records))
        drawn = [np.random.default_rng((self.seed, 1, i)).poisson(1.0, len(self.members)) for i in records]
        return torch.tensor(np.stack(drawn, axis=1), dtype=torch.float32)

    def _member_scores(self, inputs: Inputs) -> Float[Tensor, "E B"]:
        inputs = {key: tensor.to(self.device) for key, tensor in inputs.items()}
        output: BackboneOutput = self.model.backbone.forward(inputs)
        return torch.stack([self.model.score(output, inputs["input_ids"], name)[:, 0] for name in self.members])

    # --- checkpoints ---

    def adapter(self) -> tuple[RewardModelConfig, dict[str, Tensor]]:
        """Return the first member as an adapter checkpoint: a reward model without an ensemble."""
        return self.config, adapter_tensors(self.model, self.members[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the trained weights, the optimiser's state and the number of steps."""
        weights = [p.detach().cpu() for p in self._trained]
        counts = {"num_updates": self.num_updates, "num_records": self.num_records, "owed": self._owed}
        return {"weights": weights, "optimizer": self._optimizer.state_dict(), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same members and groups."""
        for parameter, stored in zip(self._trained, state["weights"], strict=True):
            parameter.data.copy_(stored)
        self._optimizer.load_state_dict(state["optimizer"])
        self.num_updates, self.num_records, self._owed = state["num_updates"], state["num_records"], state["owed"]


def _add_members(model: RewardModel, names: Sequence[str], config: RewardModelConfig, *, seed: int) -> None:
    """Add members that share LoRA and projector with the first one, which is active."""
    first = model.perspectives[names[0]]
    device, is_new = next(model.parameters()).device, _is_untrained(model, names[0])
    for number, name in enumerate(names[1:], start=1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            model.perspectives[name] = Perspective(config, nn.Identity()).to(device)
        model.configs[name] = config
        if not is_new:
            state = {key: one for key, one in first.state_dict().items() if not key.startswith("projector.")}
            model.perspectives[name].load_state_dict(state)


def _is_untrained(model: RewardModel, name: str) -> bool:
    """Return True if the LoRA of a perspective is without effect, as it is before training."""
    lora = model.groups(name)["lora"]
    return all(not bool(parameter.any()) for key, parameter in lora.items() if ".lora_B." in key)
