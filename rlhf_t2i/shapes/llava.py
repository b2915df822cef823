"""The untrained toy LLaVA, with its tokenizer and image processor."""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportReturnType=false
from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import CLIPTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rlhf_t2i.shapes.networks import make_tokenizer

SIZE, PATCH = 32, 8
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def make_backbone_tokenizer(words: Sequence[str] = ()) -> CLIPTokenizer:
    """Return the tokenizer of the toy Stable Diffusion (each word of the grammar one token) with an image token.

    `words` are further words that are one token each.
    """
    tokenizer = make_tokenizer(words)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


def make_llava(
    tokenizer: CLIPTokenizer,
    *,
    width: int = 128,
    num_layers: int = 3,
    vision_width: int = 96,
    num_vision_layers: int = 3,
) -> LlavaForConditionalGeneration:
    """Return an untrained LLaVA of a tower of 16 patches and a Llama; 0.9 million parameters by default."""
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=vision_width,
                intermediate_size=4 * vision_width,
                num_hidden_layers=num_vision_layers,
                num_attention_heads=4,
                image_size=SIZE,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=num_layers,
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
    # Large position embeddings distinguish positions from the first update on.
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.3)
    return model


def make_image_processor() -> CLIPImageProcessorPil:
    """Return CLIP's image processor for images of 32 x 32."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
