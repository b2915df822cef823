"""Train the small LLaVA under the built-in judge from scratch: `python -m rlhf_t2i.shapes.build_reader`.

It is an ordinary multimodal LLM in its ordinary format (`LlavaForConditionalGeneration`): a CLIP vision tower, a
projector and a Llama, 0.9 million parameters, taught to caption pictures of the built-in world. Half of the pictures are
drawn, a little blurred or noisy; half were painted by the built-in Stable Diffusion and are captioned with what the
oracle sees in them. It has never been told which of two pictures is better: that is what the reward training is for.
"""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportReturnType=false
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward_model.backbones.load import adapt
from reward_model.types import Backbone
from rlhf_t2i.shapes.build import make_tokenizer, pick_scenes, seeded, train
from rlhf_t2i.shapes.paintings import paint
from rlhf_t2i.shapes.scenes import Scene, all_prompts, render

SIZE, PATCH, WIDTH = 32, 4, 128
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def make_reader_tokenizer() -> CLIPTokenizer:
    """The painter's tokenizer, each word of the grammar one token, with a place for a picture."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


def make_reader(tokenizer: CLIPTokenizer) -> LlavaForConditionalGeneration:
    """64 patches of 4 x 4 pixels, three layers of width 96; a Llama of three layers of width 128."""
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
    """CLIP's settings, for pictures of 32 x 32."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def distort(images: Float[Tensor, "B 3 Y X"], generator: torch.Generator) -> Float[Tensor, "B 3 Y X"]:
    """Half of the pictures as they are, the others blurred or noisy by a random amount."""
    count = len(images)
    strength = 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    noisy = images + strength * torch.randn(images.shape, generator=generator)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    blurred = share * F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1) + (1 - share) * images
    kind = torch.rand(count, 1, 1, 1, generator=generator)
    return torch.where(kind < 0.5, images, torch.where(kind < 0.75, noisy, blurred)).clamp(0, 1)


def captioning_loss(
    backbone: Backbone, pictures: Float[Tensor, "N 3 Y X"], captions: Sequence[Sequence[str]], *, seed: int
) -> Callable[[int], Tensor]:
    """Minus the log-likelihood of one of a picture's captions, word by word, after the picture."""
    model = backbone.model

    def loss_at(update: int) -> Tensor:
        generator = seeded(seed, update)
        rows = torch.randint(len(pictures), (64,), generator=generator)
        column = torch.randint(len(captions[0]), (64,), generator=generator).tolist()
        chosen = [captions[int(row)][i] for row, i in zip(rows, column, strict=True)]
        inputs = backbone.prepare(list(distort(pictures[rows], generator)), chosen)
        silent = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == model.config.image_token_id)
        labels = inputs["input_ids"].masked_fill(silent, -100)
        return model(**inputs, labels=labels, use_cache=False).loss

    return loss_at


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Two times in three the whole prompt of a training scene; else, and for held-out scenes, a part of it."""
    if not scene.held_out and rng.random() < 2 / 3:
        return scene.prompt
    return partial_prompt(scene, rng)


def partial_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt without its background, or with its background alone."""
    subject, _, ground = scene.prompt.partition(" on a ")
    return subject if rng.random() < 2 / 3 else f"a {ground}"


def build(output_folder: Path, *, num_updates: int, num_pictures: int, seed: int) -> None:
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
    scenes = pick_scenes(num_pictures // 2, rng, shares={"one": 0.5, "count": 0.2, "relation": 0.3})
    drawn = render(scenes, rng=rng)
    painted = paint([str(rng.choice(all_prompts("training"))) for _ in range(num_pictures // 2)], seed=seed + 1)
    known = [i for i, scene in enumerate(painted.seen) if scene is not None]
    pictures = torch.cat([drawn, painted.images[known]])
    captions = [[caption(scene, rng) for _ in range(6)] for scene in [*scenes, *filter(None, painted.seen)]]
    train(
        "reader",
        nn.ModuleDict({"model": model}),
        captioning_loss(backbone, pictures, captions, seed=seed + 2),
        num_updates=num_updates,
        learning_rate=1.5e-3,
        decay=True,
        folder=work,
    )
    model.eval().half().save_pretrained(output_folder)


def main() -> None:
    """The command line of `build`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-folder", type=Path, default=Path("runs/reader"))
    parser.add_argument("--num-updates", type=int, default=6_000)
    parser.add_argument("--num-pictures", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
