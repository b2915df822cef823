"""Tiny random multimodal LLMs in the standard formats of their families, reward models on them, and random images.

Everything is built once in a process, without a network, in a folder that goes when the process ends.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reward_model.backbones.load import load_backbone
from reward_model.checkpoint import adapter_tensors, save_adapter
from reward_model.config import RewardModelConfig
from reward_model.model import RewardModel
from reward_model.scoring import LlavaReward
from reward_model.types import Backbone

FAMILIES = ("llava", "qwen2_5_vl")
ALL_FAMILIES = (*FAMILIES, "llava_next", "phi3_v", "qwen3_vl")
WIDTH = 32
MAX_TOKENS = 96
"""Number of positions of the language models."""

WORDS = ("a", "Ġ", "Ġred", "Ġblue", "Ġfox", "Ġcat", "red", "blue", "Ġon", "Ġa", "fox", "Ċ", ":", ".")
"""Words of all vocabularies; `Ġ` is a space and `Ċ` a new line, as in byte-level vocabularies."""
LLAVA_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "USER", "ASSISTANT", *WORDS)
QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "unknown", "system", "user", "assistant", "You", "Ġare", "Ġhelpful", "Ġassistant", *WORDS,
)  # fmt: skip

PHI_TOKENS = (
    "<unk>", "<s>", "<|endoftext|>", "<pad>", "<|image|>", "<|user|>", "<|assistant|>", "<|end|>", "<", "|", "image",
    "_", "1", ">", *WORDS,
)  # fmt: skip

# The templates of the families, unchanged: llava-hf/llava-1.5-7b-hf and Qwen/Qwen2.5-VL-7B-Instruct. Phi's as
# microsoft/Phi-3.5-vision-instruct renders a turn.
PHI_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Image {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The output of Qwen/Qwen3-VL-8B-Instruct for a turn of an image and a text: without a system turn.
QWEN3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="reward-models-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


# --- backbones ------------------------------------------------------------------------------------


def _tokenizer(tokens: tuple[str, ...], *, starts_with: str | None, **special: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word, split as by GPT-2; ids are indices into `tokens`."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=special["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if starts_with:
        core.post_processor = processors.TemplateProcessing(
            single=f"{starts_with} $A", special_tokens=[(starts_with, tokens.index(starts_with))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def _seeded(kind: Any, *given: Any) -> Any:
    """Return a module whose initial weights are the same in each process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*given)


def _randomise(model: nn.Module, *, seed: int) -> None:
    """Set weights large enough for every input to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)


def llava_config(**changes: Any) -> LlavaConfig:
    """Two layers each; images of 28 x 28 are four patches."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(LLAVA_TOKENS),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, **changes)


def _save_llava(folder: Path, **changes: Any) -> None:
    model = _seeded(LlavaForConditionalGeneration, llava_config(**changes))
    _randomise(model, seed=1)
    model.save_pretrained(folder)
    _save_llava_tokenizer(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def _save_llava_next(folder: Path) -> None:
    """Grids of two to four crops, each of 28 x 28 pixels: four patches."""
    grids = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    own = llava_config()
    config = LlavaNextConfig(
        vision_config=own.vision_config, text_config=own.text_config, image_token_id=4, image_grid_pinpoints=grids
    )
    model = _seeded(LlavaNextForConditionalGeneration, config)
    _randomise(model, seed=14)
    model.save_pretrained(folder)
    _save_llava_tokenizer(folder)
    crop = {"height": 28, "width": 28}
    LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop, image_grid_pinpoints=grids).save_pretrained(
        folder
    )


def _save_llava_tokenizer(folder: Path) -> None:
    tokenizer = _tokenizer(
        LLAVA_TOKENS, starts_with="<s>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    tokenizer.chat_template = LLAVA_TEMPLATE
    tokenizer.save_pretrained(folder)


def _save_qwen(folder: Path) -> None:
    """Windows of 2 x 2 visual tokens in the first layer of the tower, full attention in the second."""
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": WIDTH,
        },
        text_config={
            "vocab_size": len(QWEN_TOKENS),
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_TOKENS,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    _randomise(model, seed=2)
    model.save_pretrained(folder)
    save_qwen_preprocessors(folder, QWEN_TEMPLATE, patch_size=14)


def _save_qwen3(folder: Path) -> None:
    """Three layers in the tower, of which the first two are DeepStack inputs of the language model's two."""
    config = Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "out_hidden_size": WIDTH,
        },
        text_config={
            "vocab_size": len(QWEN_TOKENS),
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": MAX_TOKENS,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True,
            },
            "pad_token_id": 0,
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    _randomise(model, seed=16)
    model.save_pretrained(folder)
    save_qwen_preprocessors(folder, QWEN3_TEMPLATE, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def save_qwen_preprocessors(folder: Path, template: str, *, patch_size: int, **settings: Any) -> None:
    """Images become 4 to 16 tokens."""
    tokenizer = _tokenizer(
        QWEN_TOKENS, starts_with=None, eos_token="<|im_end|>", unk_token="unknown", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *QWEN_TOKENS[3:7]],
    )  # fmt: skip
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    bounds = {"shortest_edge": 4 * (2 * patch_size) ** 2, "longest_edge": 16 * (2 * patch_size) ** 2}
    Qwen2VLImageProcessorPil(size=bounds, patch_size=patch_size, **settings).save_pretrained(folder)


def phi_config(**changes: Any) -> dict[str, Any]:
    """A config.json as Phi-3.5-vision's: crops of 56 x 56 are 4 x 4 patches and 2 x 2 tokens; layer 2 of 3 is used."""
    return {
        "architectures": ["Phi3VForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi3_v.Phi3VConfig"},
        "model_type": "phi3_v",
        "_attn_implementation": "flash_attention_2",
        "vocab_size": len(PHI_TOKENS),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4 * MAX_TOKENS,
        "original_max_position_embeddings": MAX_TOKENS,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [2.0, 3.0, 4.0, 5.0]},
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "img_processor": {
            "image_dim_out": 16,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 4,
        },
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        **changes,
    }


def phi_decoder(config: dict[str, Any]) -> Phi3ForCausalLM:
    """Return the language model alone, of transformers."""
    own = {name: config[name] for name in PHI_DECODER}
    return Phi3ForCausalLM(Phi3Config(**own, rope_scaling={**config["rope_scaling"], "type": "longrope"}))


def phi_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their published names, including unused ones."""
    vision = _seeded(CLIPVisionModel, CLIPVisionConfig(**config["vision_config"]))
    words = phi_decoder(config)
    layers = [_seeded(nn.Linear, size, WIDTH) for size in (64, WIDTH)]
    projection = nn.Sequential(layers[0], nn.GELU(), layers[1])
    for i, part in enumerate((vision, words, projection)):
        _randomise(part, seed=3 + i)
    generator, inside = torch.Generator().manual_seed(6), "model.vision_embed_tokens."
    return {
        **words.state_dict(),
        **{f"{inside}img_processor.vision_model.{name}": tensor for name, tensor in vision.state_dict().items()},
        **{f"{inside}img_projection.{name}": tensor for name, tensor in projection.state_dict().items()},
        f"{inside}glb_GN": torch.randn(1, 1, 64, generator=generator),
        f"{inside}sub_GN": torch.randn(1, 1, 1, 64, generator=generator),
        f"{inside}wte.weight": words.state_dict()["model.embed_tokens.weight"].clone(),
    }


PHI_DECODER = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "original_max_position_embeddings", "rope_theta", "pad_token_id",
)  # fmt: skip


def save_phi(folder: Path, *, num_shards: int = 1, **changes: Any) -> None:
    """Save a folder as published; with an index for more than one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    config = phi_config(**changes)
    tensors = phi_tensors(config)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{num_shards:05}.safetensors": names[i::num_shards] for i in range(num_shards)}
    for file, held in files.items():
        path = folder / (file if num_shards > 1 else "model.safetensors")
        save_file({name: tensors[name].contiguous() for name in held}, path, metadata={"format": "pt"})
    if num_shards > 1:
        where = {name: file for file, held in files.items() for name in held}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer = _tokenizer(
        PHI_TOKENS, starts_with=None, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=list(PHI_TOKENS[4:8]),
    )  # fmt: skip
    tokenizer.chat_template = PHI_TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "num_crops": 4}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_processor_type": "Phi3VImageProcessor"})
    )


@cache
def backbone_folder(family: str) -> Path:
    """Return the folder of a model as saved by transformers: weights, tokenizer, chat template, image processor."""
    folder = _root() / family
    match family:
        case "llava":
            _save_llava(folder)
        case "llava_two_layers":
            _save_llava(folder, vision_feature_layer=[-2, -1], vision_feature_select_strategy="full")
        case "qwen2_5_vl":
            _save_qwen(folder)
        case "llava_next":
            _save_llava_next(folder)
        case "phi3_v":
            save_phi(folder)
        case "qwen3_vl":
            _save_qwen3(folder)
        case other:
            raise ValueError(other)
    return folder


def fresh_backbone(family: str, **options: Any) -> Backbone:
    """Return a new backbone, which the caller may modify."""
    return load_backbone(str(backbone_folder(family)), **options)


@cache
def backbone_of(family: str, template: str = "family", padding_side: str = "right") -> Backbone:
    """Return a backbone that all tests share; do not modify it."""
    return fresh_backbone(family, template=template, padding_side=padding_side)


# --- reward models ------------------------------------------------------------------------------------


def config_of(family: str, **changes: Any) -> RewardModelConfig:
    """Return a config small enough for the tiny models."""
    options = {"width": WIDTH, "lora_rank": 2, "lora_alpha": 4.0, **changes}
    return RewardModelConfig(backbone=str(backbone_folder(family)), model_type=family, **options)


def scatter(model: RewardModel, *, seed: int) -> None:
    """Move every weight of the active perspective far from its initial value, as a long training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model, model.active).items():
            scale = 1.0 if key.startswith("head") else 0.2
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def fresh_model(family: str, *, seed: int = 0, padding_side: str = "right", **options: Any) -> RewardModel:
    """Return a reward model in memory with one perspective, of random weights."""
    config = config_of(family, **options)
    options = {key: getattr(config, key) for key in ("template", "min_pixels", "max_pixels", "num_crops")}
    model = RewardModel(fresh_backbone(family, padding_side=padding_side, **options))
    model.add(config)
    scatter(model, seed=seed)
    return model.eval()


@cache
def _saved(family: str, seed: int, options: str) -> Path:
    model = fresh_model(family, seed=seed, **json.loads(options))
    folder = Path(tempfile.mkdtemp(dir=_root()))
    return save_adapter(model.configs[model.active], adapter_tensors(model, model.active), folder)


def reward_model_folder(family: str, *, seed: int = 0, **options: Any) -> Path:
    """Return the adapter checkpoint of such a model; do not modify it, copy it first."""
    return _saved(family, seed, json.dumps(options, sort_keys=True))


def load(family: str, *, seed: int = 0, **options: Any) -> LlavaReward:
    """Load such a model as a user does."""
    return LlavaReward.from_pretrained(reward_model_folder(family, seed=seed, **options))


# --- images -------------------------------------------------------------------------------------


def bytes_of(height: int, width: int, *, seed: int = 0) -> Tensor:
    """Return an image of noise in 8 bits, (3, height, width)."""
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_image(height: int, width: int, *, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return an image of noise with values from `low` to `high`."""
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * noise
