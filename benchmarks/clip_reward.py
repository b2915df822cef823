"""Train a CLIP reward of the toy world, to compare with LLaVA-Reward: `python benchmarks/clip_reward.py`.

A `CLIPModel`, trained from scratch by contrastive learning on the images and texts of the built-in reward model's
backbone, with a vision tower of the same size and the same pretraining. It is not trained on preferences.
`clip:FOLDER` is the reward. No full prompt of the held-out half is used in training.

Prints Markdown: its accuracy on the test pairs of the built-in reward model.
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
    SIZE,
    CaptionedImages,
    distort,
    make_image_processor,
    make_training_images,
    train_vision_tower,
)
from rlhf_t2i.shapes.names import toy_pairs_folder
from rlhf_t2i.shapes.networks import MAX_TOKENS, make_tokenizer, tokenize
from rlhf_t2i.shapes.pairs import TESTS, write_pairs
from rlhf_t2i.shapes.scenes import Scene
from rlhf_t2i.shapes.train import train, update_generator

WIDTH = 128
BATCH = 128


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained CLIP: the vision tower of the built-in reward model, and a text encoder of three layers."""
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
    # Large embeddings distinguish words and positions from the first update on.
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=1.0)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.3)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.3)
    return model


def true_texts(scene: Scene) -> set[str]:
    """Return all true texts of the grammar: full prompt, subject and background, relations in either direction."""
    prompts = {scene.prompt, scene.mirrored.prompt}
    return prompts | {prompt.partition(" on a ")[0] for prompt in prompts} | {f"a {scene.background} background"}


def contrastive_loss(
    images: Float[Tensor, "B D"], texts: Float[Tensor, "2B D"], true: Tensor, *, scale: Tensor
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020, Fig. 3) with a false text for each true one (arXiv:2210.01936).

        loss = [-log softmax_j(s cos(image_i, text_j)) at j = i  -  log softmax_i(s cos(image_i, text_j)) at i = j] / 2

    The first B texts are the true texts of the B images, in order. `true` (B, 2B) marks all texts that are true of an
    image; the ones besides its own are left out.
    """
    own = torch.arange(len(images))
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    others = true.clone()
    others[own, own] = False
    logits = logits.masked_fill(others, -torch.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(images)].T, own)) / 2


def matching_loss(
    model: CLIPModel, tokenizer: CLIPTokenizer, data: CaptionedImages, *, seed: int
) -> Callable[[int], Tensor]:
    """Return the contrastive loss of an update: a random batch, each image with one true and one false text."""
    settings = make_image_processor()
    truths = [true_texts(scene) for scene in data.scenes]
    vocabulary = sorted({text for rows in (data.true_texts, data.false_texts) for row in rows for text in row})
    ids = tokenize(tokenizer, vocabulary)
    ids = ids[:, : int((ids != tokenizer.eos_token_id).sum(1).max()) + 1]
    index = {text: i for i, text in enumerate(vocabulary)}

    def loss_at(update: int) -> Tensor:
        generator = update_generator(seed, update)
        rows = torch.randint(len(data.images), (BATCH,), generator=generator)
        columns = torch.randint(len(data.true_texts[0]), (BATCH,), generator=generator)
        chosen = list(zip(rows.tolist(), columns.tolist(), strict=True))
        texts = [data.true_texts[row][i] for row, i in chosen] + [data.false_texts[row][i] for row, i in chosen]
        true = torch.tensor([[text in truths[row] for text in texts] for row, _ in chosen])
        pixels = normalise(distort(data.images[rows], generator), mean=settings.image_mean, std=settings.image_std)
        image_embeddings = model.get_image_features(pixel_values=pixels).pooler_output
        unique, inverse = torch.tensor([index[text] for text in texts]).unique(return_inverse=True)
        text_embeddings = model.get_text_features(input_ids=ids[unique]).pooler_output[inverse]
        return contrastive_loss(image_embeddings, text_embeddings, true, scale=model.logit_scale.exp().clamp_max(100))

    return loss_at


def build(
    folder: Path, *, num_vision_updates: int, num_updates: int, num_drawings: int, num_generated: int, seed: int
) -> None:
    """Train the model and save it with its tokenizer and image processor; an interrupted run continues."""
    work = folder.with_name(folder.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    data = make_training_images(num_drawings, num_generated, np.random.default_rng(seed), seed=seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_clip(tokenizer)
    train_vision_tower(model.vision_model, data, num_updates=num_vision_updates, folder=work, seed=seed)
    train(
        "similarity",
        nn.ModuleDict({"model": model}),
        matching_loss(model, tokenizer, data, seed=seed + 2),
        num_updates=num_updates,
        learning_rate=1e-3,
        decay=True,
        folder=work,
    )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)


@torch.no_grad()
def accuracy(clip: Clip, file: Path) -> tuple[float, int]:
    """Return the fraction of pairs whose winner scores higher (a tie is wrong), and the number of pairs."""
    pairs = [record for record in load_records(file) if isinstance(record, PreferencePair)]

    def scores(side: str) -> Tensor:
        images = torch.stack([to_tensor(getattr(pair, side)) for pair in pairs])
        return clip(images, [getattr(pair, f"{side}_prompt") for pair in pairs])

    return (scores("winner") > scores("loser")).float().mean().item(), len(pairs)


def main() -> None:
    """Train, evaluate on the test pairs, and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/clip_reward"), help="folder of the model")
    parser.add_argument("--pairs", type=Path, default=toy_pairs_folder(0), help="toy pairs, made if they are not there")
    parser.add_argument("--num_vision_updates", type=int, default=1_200, help="updates of the vision tower alone")
    parser.add_argument("--num_updates", type=int, default=3_600, help="updates of the full model after that")
    parser.add_argument("--num_drawings", type=int, default=30_000, help="drawings to train on")
    parser.add_argument("--num_generated", type=int, default=6_000, help="generated images to train on")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    output, pairs = arguments.pop("output"), write_pairs(arguments.pop("pairs"))
    build(output, **arguments)
    clip = load_clip(output)
    sys.stdout.write("| test set | pairs | accuracy, % |\n|---|---|---|\n")
    for name in TESTS:
        fraction, count = accuracy(clip, pairs / f"{name}.jsonl")
        sys.stdout.write(f"| {name} | {count:,} | {100 * fraction:.1f} |\n")


if __name__ == "__main__":
    main()
