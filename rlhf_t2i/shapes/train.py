"""The training loop of the toy models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


def train(
    name: str,
    modules: nn.ModuleDict,
    loss_at: Callable[[int], Tensor],
    *,
    num_updates: int,
    learning_rate: float,
    decay: bool,
    folder: Path,
    matrices: Sequence[nn.Parameter] = (),
) -> None:
    """Minimise `loss_at(update)` with AdamW, warm-up and, with `decay`, a linear decay over the last half.

    `matrices` are trained by Muon (https://kellerjordan.github.io/posts/muon/) in place of AdamW, at the same rate.

    The state is saved every 250 updates and loaded if there is one. `loss_at` derives all random numbers from the
    index of the update, so that a resumed run equals an uninterrupted one.
    """
    path = folder / f"{name}.pt"
    others = [parameter for parameter in modules.parameters() if all(parameter is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=learning_rate, weight_decay=1e-3)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["num_updates"]
    progress = tqdm(range(start, num_updates), initial=start, total=num_updates, desc=name)
    for update in progress:
        remaining = 1 - update / num_updates if decay else 1.0
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate * min(1, (update + 1) / 100, 2 * remaining)
        loss = loss_at(update)
        modules.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (update + 1) % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (update + 1) % 250 == 0 or update + 1 == num_updates:
            state = {
                "modules": modules.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "num_updates": update + 1,
            }
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)


def update_generator(seed: int, update: int) -> torch.Generator:
    """Return the generator of one update: a pure function of the seed and the index of the update."""
    return torch.Generator().manual_seed(seed * 1_000_003 + update)
