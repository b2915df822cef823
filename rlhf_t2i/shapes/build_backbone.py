"""Train the small LLaVA under the built-in judge from scratch: `python -m rlhf_t2i.shapes.build_backbone`.

It is an ordinary multimodal LLM in its ordinary format (`LlavaForConditionalGeneration`): a CLIP vision tower, a
projector and a Llama, 0.9 million parameters, taught to caption images of the built-in world and to say whether a
text is true of one. Most images are drawn, a little blurred or noisy; the others were painted by the built-in Stable
Diffusion and are described by what the oracle sees in them. It has never been told which of two images is better:
that is what the reward training is for.
"""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportReturnType=false
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward_model.backbones.load import adapt
from reward_model.images import normalise
from reward_model.types import Backbone
from rlhf_t2i.shapes.captions import random_scenes
from rlhf_t2i.shapes.generated import generate_images
from rlhf_t2i.shapes.networks import make_tokenizer
from rlhf_t2i.shapes.pairs import random_near_miss
from rlhf_t2i.shapes.scenes import MIRRORED, PALETTE, RELATIONS, SHAPES, Scene, Thing, all_prompts, render
from rlhf_t2i.shapes.train import train, update_generator

SIZE, PATCH, WIDTH = 32, 8, 128
SHARES = {"one": 0.3, "count": 0.2, "relation": 0.5}
"""Of the tiers among drawn images."""
STANDS = ("alone", "one of two", "one of three", *RELATIONS)
"""How a thing stands to the others of its image."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def make_reader_tokenizer() -> CLIPTokenizer:
    """The painter's tokenizer, each word of the grammar one token, with a place for an image."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


def make_reader(tokenizer: CLIPTokenizer) -> LlavaForConditionalGeneration:
    """16 patches of 8 x 8 pixels, three layers of width 96; a Llama of three layers of width 128."""
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=SIZE,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=512,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                tie_word_embeddings=True,
            ),
            image_token_id=image_token,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    )
    # Wide position embeddings let places differ from the first update on.
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.3)
    return model


def make_image_processor() -> CLIPImageProcessorPil:
    """CLIP's settings, for images of 32 x 32."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def distort(images: Float[Tensor, "B 3 Y X"], generator: torch.Generator) -> Float[Tensor, "B 3 Y X"]:
    """Half of the images as they are, the others blurred or noisy by a random amount."""
    count = len(images)
    strength = 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    noisy = images + strength * torch.randn(images.shape, generator=generator)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    blurred = share * F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1) + (1 - share) * images
    kind = torch.rand(count, 1, 1, 1, generator=generator)
    return torch.where(kind < 0.5, images, torch.where(kind < 0.75, noisy, blurred)).clamp(0, 1)


def patch_labels(images: Float[Tensor, "N 3 Y X"], scenes: Sequence[Scene]) -> Int[Tensor, "N P 2"]:
    """What lies in the middle of each patch: its shape, and how it stands to the others; each 0 for the background.

    Else 1 + the number in `SHAPES` and in `STANDS`. A patch belongs to what has the nearest colour of its scene's own.
    """
    middle = PATCH // 2 - 1
    middles = F.avg_pool2d(images[..., middle : SIZE - middle, middle : SIZE - middle], 2, stride=PATCH)
    middles = middles.flatten(2).mT
    labels = torch.zeros(*middles.shape[:2], 2, dtype=torch.long)
    for row, scene in enumerate(scenes):
        colours = torch.tensor([PALETTE[name] for name in (scene.background, *(t.colour for t in scene.things))])
        kinds = [(1 + SHAPES.index(thing.shape), 1 + STANDS.index(stands)) for thing, stands in _standing(scene)]
        labels[row] = torch.tensor([(0, 0), *kinds])[torch.cdist(middles[row], colours).argmin(dim=1)]
    return labels


def _standing(scene: Scene) -> list[tuple[Thing, str]]:
    """Each thing of a scene, with how it stands to the others."""
    if scene.relation is not None:
        first, last = scene.things
        return [(first, scene.relation), (last, MIRRORED[scene.relation])]
    return [(thing, STANDS[len(scene.things) - 1]) for thing in scene.things]


def seeing_loss(
    tower: nn.Module, probe: nn.Module, images: Float[Tensor, "N 3 Y X"], labels: Int[Tensor, "N P 2"], *, seed: int
) -> Callable[[int], Tensor]:
    """What each patch belongs to, by a linear probe: 32 answers an image, where a caption has a few."""
    settings = make_image_processor()

    def loss_at(update: int) -> Tensor:
        generator = update_generator(seed, update)
        rows = torch.randint(len(images), (128,), generator=generator)
        pixels = normalise(distort(images[rows], generator), mean=settings.image_mean, std=settings.image_std)
        shapes, stands = probe(tower(pixels).last_hidden_state[:, 1:]).split((1 + len(SHAPES), 1 + len(STANDS)), dim=-1)
        return F.cross_entropy(shapes.mT, labels[rows, :, 0]) + F.cross_entropy(stands.mT, labels[rows, :, 1])

    return loss_at


@dataclass(frozen=True, slots=True)
class Shown:
    """Images, and for each some texts with whether they are true of it."""

    images: Float[Tensor, "N 3 Y X"]
    scenes: list[Scene]
    right: list[list[str]]
    wrong: list[list[str]]


def reading_loss(backbone: Backbone, shown: Shown, *, num_captioning: int, seed: int) -> Callable[[int], Tensor]:
    """Captioning, and from update `num_captioning` on also answering: the words of a true text, and whether it is true.

    A true text is predicted word by word after its image. After any text the next token is `y` or `n`, as an
    assistant would answer the question whether this is what the image shows.
    """
    model, tokenizer = backbone.model, backbone.prompt_tokenizer.tokenizer
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(["n</w>", "y</w>"]))

    def loss_at(update: int) -> Tensor:
        generator = update_generator(seed, update)
        answering = update >= num_captioning
        rows = torch.randint(len(shown.images), (32 if answering else 64,), generator=generator)
        column = torch.randint(len(shown.right[0]), rows.shape, generator=generator).tolist()
        images = distort(shown.images[rows], generator)
        texts = [shown.right[row][i] for row, i in zip(rows.tolist(), column, strict=True)]
        if answering:  # both texts of one image: all that they share cancels
            images = torch.cat([images, images])
            texts += [shown.wrong[row][i] for row, i in zip(rows.tolist(), column, strict=True)]
        true = torch.arange(64) < len(rows)
        inputs = backbone.prepare(list(images), texts)
        logits = model(**inputs, use_cache=False).logits
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        silent = ~mask | (ids == model.config.image_token_id)
        words = ids.masked_fill(silent | ~true[:, None], -100)[:, 1:]
        ends = logits[torch.arange(64), mask.sum(1) - 1]
        captioning = F.cross_entropy(logits[:, :-1].flatten(0, 1), words.flatten())
        return captioning + F.cross_entropy(ends, answers[true.long()]) if answering else captioning

    return loss_at


def texts_of(scene: Scene, others: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str]:
    """A text that is true of an image of the scene, and one that is not, in the same form.

    The whole prompt of a scene of the training half, or a part of it. No text is the prompt of a held-out scene. Two
    things are told from either side.
    """
    while True:
        if rng.random() < 0.5:
            scene = scene.mirrored
        miss = random_near_miss(scene, rng) if rng.random() < 0.7 else others[rng.integers(len(others))]
        part = rng.choice(["whole", "subject", "ground"], p=[0.7, 0.2, 0.1])
        right, wrong = _part(scene, part), _part(miss, part)
        if right != wrong and not (part == "whole" and (scene.held_out or miss.held_out)):
            return right, wrong


def _part(scene: Scene, part: str) -> str:
    subject, _, ground = scene.prompt.partition(" on a ")
    return {"whole": scene.prompt, "subject": subject, "ground": f"a {ground}"}[part]


def look_at(images: Float[Tensor, "N 3 Y X"], scenes: Sequence[Scene], rng: np.random.Generator) -> Shown:
    """Six true texts and six wrong ones for each image."""
    texts = [[texts_of(scene, scenes, rng) for _ in range(6)] for scene in scenes]
    return Shown(
        images,
        list(scenes),
        [[right for right, _ in row] for row in texts],
        [[wrong for _, wrong in row] for row in texts],
    )


def build(
    output_folder: Path, *, num_eye_updates: int, num_updates: int, num_drawn: int, num_painted: int, seed: int
) -> None:
    """Train the reader and write it, with tokenizer and image settings, in half precision."""
    work = output_folder.with_name(output_folder.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_reader_tokenizer()
    torch.manual_seed(seed)
    model = make_reader(tokenizer)
    output_folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output_folder)
    make_image_processor().save_pretrained(output_folder)
    backbone = adapt(model, str(output_folder))

    rng = np.random.default_rng(seed)
    scenes = random_scenes(num_drawn, rng, shares=SHARES)
    drawn = render(scenes, rng=rng)
    generated = generate_images([str(rng.choice(all_prompts("training"))) for _ in range(num_painted)], seed=seed + 1)
    known = [i for i, scene in enumerate(generated.shown) if scene is not None]
    shown = look_at(torch.cat([drawn, generated.images[known]]), [*scenes, *filter(None, generated.shown)], rng)
    tower = model.model.vision_tower
    probe = nn.Linear(tower.config.hidden_size, 2 + len(SHAPES) + len(STANDS))
    train(
        "eyes",
        nn.ModuleDict({"tower": tower, "probe": probe}),
        seeing_loss(tower, probe, shown.images, patch_labels(shown.images, shown.scenes), seed=seed + 3),
        num_updates=num_eye_updates,
        learning_rate=1.5e-3,
        decay=True,
        folder=work,
    )
    train(
        "reader",
        nn.ModuleDict({"model": model}),
        reading_loss(backbone, shown, num_captioning=num_updates // 3, seed=seed + 2),
        num_updates=num_updates,
        learning_rate=1.5e-3,
        decay=True,
        folder=work,
    )
    model.eval().half().save_pretrained(output_folder)


def main() -> None:
    """The command line of `build`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=Path("runs/reader"))
    parser.add_argument("--num_eye_updates", type=int, default=1_200)
    parser.add_argument("--num_updates", type=int, default=6_000)
    parser.add_argument("--num_drawn", type=int, default=30_000)
    parser.add_argument("--num_painted", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=0)
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
