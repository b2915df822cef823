"""An image-text similarity judge of the built-in world: `python benchmarks/clip_reward.py --output FOLDER`.

An ordinary `CLIPModel`, trained from scratch to tell which text belongs to which image, to stand beside LLaVA-Reward:
its images and texts are those that the backbone of the built-in judge learnt from, its eyes are of the same size and
get the same first lesson. It has never been told which of two images is better. `clip:FOLDER` is the reward.

Prints Markdown: how often it agrees with the judge's own test pairs. Prompts of the held-out half are never read whole.
"""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalSubscript=false
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from reward_model.datasets import load_records
from reward_model.images import normalise, to_tensor
from reward_model.scorers.clip import Clip, load_clip
from reward_model.types import PreferencePair
from rlhf_t2i.shapes.build_backbone import (
    PATCH,
    SHARES,
    SIZE,
    STANDS,
    Shown,
    distort,
    look_at,
    make_image_processor,
    patch_labels,
    seeing_loss,
)
from rlhf_t2i.shapes.captions import random_scenes
from rlhf_t2i.shapes.generated import generate_images
from rlhf_t2i.shapes.networks import MAX_TOKENS, make_tokenizer, tokenize
from rlhf_t2i.shapes.pairs import TESTS, write_pairs
from rlhf_t2i.shapes.scenes import SHAPES, Scene, all_prompts, render
from rlhf_t2i.shapes.train import train, update_generator

WIDTH = 128
BATCH = 128


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Eyes as those of the built-in judge, 16 patches of 8 x 8 pixels; a text encoder of three layers."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))
    # Wide embeddings let words and places differ from the first update on.
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=1.0)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.3)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.3)
    return model


def true_texts(scene: Scene) -> set[str]:
    """All that may be said of an image: the whole, what is on it, its background; two things from either side."""
    told = {scene.prompt, scene.mirrored.prompt}
    return told | {prompt.partition(" on a ")[0] for prompt in told} | {f"a {scene.background} background"}


def contrastive_loss(
    images: Float[Tensor, "B D"], texts: Float[Tensor, "2B D"], true: Tensor, *, scale: Tensor
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020, Fig. 3) with a wrong text beside each right one (arXiv:2210.01936).

        loss = [-log softmax_j(s cos(image_i, text_j)) at j = i  -  log softmax_i(s cos(image_i, text_j)) at i = j] / 2

    The first B texts are the right ones of the B images. `true` (B, 2B) says which other texts are true of an image as
    well: these are neither right nor wrong answers and are left out.
    """
    own = torch.arange(len(images))
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    others = true.clone()
    others[own, own] = False
    logits = logits.masked_fill(others, -torch.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(images)].T, own)) / 2


def matching_loss(model: CLIPModel, tokenizer: CLIPTokenizer, shown: Shown, *, seed: int) -> Callable[[int], Tensor]:
    """The contrastive loss of a random batch, each image with one of its true texts and one wrong one."""
    settings = make_image_processor()
    truths = [true_texts(scene) for scene in shown.scenes]
    vocabulary = sorted({text for rows in (shown.right, shown.wrong) for row in rows for text in row})
    ids = tokenize(tokenizer, vocabulary)
    ids = ids[:, : int((ids != tokenizer.eos_token_id).sum(1).max()) + 1]
    place = {text: i for i, text in enumerate(vocabulary)}

    def loss_at(update: int) -> Tensor:
        generator = update_generator(seed, update)
        rows = torch.randint(len(shown.images), (BATCH,), generator=generator)
        columns = torch.randint(len(shown.right[0]), (BATCH,), generator=generator)
        chosen = list(zip(rows.tolist(), columns.tolist(), strict=True))
        texts = [shown.right[row][i] for row, i in chosen] + [shown.wrong[row][i] for row, i in chosen]
        true = torch.tensor([[text in truths[row] for text in texts] for row, _ in chosen])
        pixels = normalise(distort(shown.images[rows], generator), mean=settings.image_mean, std=settings.image_std)
        seen = model.get_image_features(pixel_values=pixels).pooler_output
        places, rows_of = torch.tensor([place[text] for text in texts]).unique(return_inverse=True)
        read = model.get_text_features(input_ids=ids[places]).pooler_output[rows_of]
        return contrastive_loss(seen, read, true, scale=model.logit_scale.exp().clamp_max(100))

    return loss_at


def build(folder: Path, *, num_eye_updates: int, num_updates: int, num_drawn: int, num_painted: int, seed: int) -> None:
    """Train the model and write it with its tokenizer and image settings; a run that was stopped goes on."""
    work = folder.with_name(folder.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    scenes = random_scenes(num_drawn, rng, shares=SHARES)
    drawn = render(scenes, rng=rng)
    generated = generate_images([str(rng.choice(all_prompts("training"))) for _ in range(num_painted)], seed=seed + 1)
    known = [i for i, scene in enumerate(generated.shown) if scene is not None]
    shown = look_at(torch.cat([drawn, generated.images[known]]), [*scenes, *filter(None, generated.shown)], rng)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_clip(tokenizer)
    tower = model.vision_model
    probe = nn.Linear(tower.config.hidden_size, 2 + len(SHAPES) + len(STANDS))
    labels = patch_labels(shown.images, shown.scenes)
    train(
        "eyes",
        nn.ModuleDict({"tower": tower, "probe": probe}),
        seeing_loss(tower, probe, shown.images, labels, seed=seed + 3),
        num_updates=num_eye_updates,
        learning_rate=1.5e-3,
        decay=True,
        folder=work,
    )
    train(
        "similarity",
        nn.ModuleDict({"model": model}),
        matching_loss(model, tokenizer, shown, seed=seed + 2),
        num_updates=num_updates,
        learning_rate=1e-3,
        decay=True,
        folder=work,
    )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)


@torch.no_grad()
def accuracy(judge: Clip, file: Path) -> tuple[float, int]:
    """The share of pairs whose winner scores higher, and how many pairs there are; a tie counts as wrong."""
    pairs = [record for record in load_records(file) if isinstance(record, PreferencePair)]

    def scores(side: str) -> Tensor:
        images = torch.stack([to_tensor(getattr(pair, side)) for pair in pairs])
        return judge(images, [getattr(pair, f"{side}_prompt") for pair in pairs])

    return (scores("winner") > scores("loser")).float().mean().item(), len(pairs)


def main() -> None:
    """Train, measure on the judge's test pairs, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/similarity"))
    parser.add_argument("--pairs", type=Path, default=Path("runs/shapes-pairs-0"), help="made if they are not there")
    parser.add_argument("--num_eye_updates", type=int, default=1_200)
    parser.add_argument("--num_updates", type=int, default=3_600)
    parser.add_argument("--num_drawn", type=int, default=30_000)
    parser.add_argument("--num_painted", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    output, pairs = arguments.pop("output"), write_pairs(arguments.pop("pairs"))
    build(output, **arguments)
    judge = load_clip(output)
    sys.stdout.write("| test set | pairs | accuracy, % |\n|---|---|---|\n")
    for name in TESTS:
        share, count = accuracy(judge, pairs / f"{name}.jsonl")
        sys.stdout.write(f"| {name} | {count:,} | {100 * share:.1f} |\n")


if __name__ == "__main__":
    main()
