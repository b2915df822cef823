"""The training loop of the toy models."""

from __future__ import annotations

from collections.abc import Callable
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
) -> None:
    """Minimise `loss_at(update)` with AdamW, warm-up and, with `decay`, a linear decay over the last half.

    The state is saved every 250 updates and loaded if there is one. `loss_at` derives all random numbers from the
    index of the update, so that a resumed run equals an uninterrupted one.
    """
    path = folder / f"{name}.pt"
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, weight_decay=1e-3)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["num_updates"]
    progress = tqdm(range(start, num_updates), initial=start, total=num_updates, desc=name)
    for update in progress:
        remaining = 1 - update / num_updates if decay else 1.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (update + 1) / 100, 2 * remaining)
        loss = loss_at(update)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        if (update + 1) % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (update + 1) % 250 == 0 or update + 1 == num_updates:
            state = {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "num_updates": update + 1,
            }
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)


def update_generator(seed: int, update: int) -> torch.Generator:
    """Return the generator of one update: a pure function of the seed and the index of the update."""
    return torch.Generator().manual_seed(seed * 1_000_003 + update)
