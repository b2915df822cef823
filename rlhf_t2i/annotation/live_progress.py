"""Images of the same prompts and seeds before training, a step ago and now, and how much better they became."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.annotation.live_serve import Progress
from rlhf_t2i.annotation.questions import image_path, read_image, save_image
from rlhf_t2i.output.files import write_atomically

_FILE = "progress.json"
Score = Callable[[Float[Tensor, "B 3 Y X"], Sequence[str]], Float[Tensor, "E B"]]


class ProgressImages:
    """Images of some prompts in the folder of votes, which outlive the process."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        self.folder, self.prompts = folder, list(prompts)
        path = folder / _FILE
        stored: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._start, self._last = stored.get("start", []), stored.get("last", [])

    def update(
        self, images: Float[Tensor, "B 3 Y X"], score: Score, *, temperature: float, device: torch.device
    ) -> list[Progress]:
        """Take the images of now; return them beside those of before, compared by the reward model of now."""
        now = [save_image(self.folder, image.cpu()) for image in images]
        start, last = self._start or now, self._last or now
        shown = torch.stack([read_image(image_path(self.folder, name)) for name in (*start, *last)])
        scores = score(torch.cat([shown.to(device), images]), self.prompts * 3).double().cpu().chunk(3, dim=1)
        better = [torch.sigmoid((scores[2] - one) / temperature).mean(dim=0).tolist() for one in scores[:2]]
        names = zip(start, last, now, strict=True)
        found = [Progress(str(p), *rest) for p, *rest in zip(self.prompts, names, *better, strict=True)]
        write_atomically(self.folder / _FILE, json.dumps({"start": start, "last": now}))
        for name in set(self._last) - {*start, *last, *now}:
            image_path(self.folder, name).unlink(missing_ok=True)
        self._start, self._last = start, now
        return found
