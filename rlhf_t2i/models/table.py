"""The table of model families: every diffusers pipeline class that can be trained, its module, and its usual settings.

Light: it imports no library that takes seconds, so that options can be answered before torch is imported.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reward_model.text_files import read_object
from rlhf_t2i.models.architectures import published_architecture
from rlhf_t2i.passed import passed
from rlhf_t2i.shapes.names import TOY_MODELS

INDEX = "model_index.json"
"""File of a pipeline folder that names its class and parts."""


@dataclass(frozen=True, slots=True)
class FamilyEntry:
    """A row of the table: where a family's class is, and the options that its models are trained and sampled with."""

    module: str
    """Module of rlhf_t2i.models."""
    name: str
    """Class in it."""
    training_steps: int
    """Denoising steps for one image in training."""
    sampling_steps: int
    """Denoising steps for one image in evaluation and search."""
    guidance_scale: float
    lora_rank: int
    microbatch_size: int
    """Images in one forward pass, meant for 24 GB with a LoRA; not measured."""
    gradient_checkpointing: bool
    edits_images: bool = False
    """True if an image to be edited can be a condition beside the prompt."""
    has_instruction: bool = False
    """True if the stock pipeline puts an instruction before every prompt."""

    @property
    def pair_microbatch_size(self) -> int:
        """Images in one forward pass on pairs: at least those of one."""
        return max(2, self.microbatch_size)


FAMILIES = {
    "StableDiffusionPipeline": FamilyEntry(
        "stable_diffusion",
        "StableDiffusion",
        training_steps=50,
        sampling_steps=50,
        guidance_scale=5.0,
        lora_rank=4,
        microbatch_size=4,
        gradient_checkpointing=False,
    ),
    "StableDiffusionXLPipeline": FamilyEntry(
        "sdxl",
        "StableDiffusionXL",
        training_steps=50,
        sampling_steps=50,
        guidance_scale=5.0,
        lora_rank=4,
        microbatch_size=2,
        gradient_checkpointing=True,
    ),
    "StableDiffusion3Pipeline": FamilyEntry(
        "sd3",
        "StableDiffusion3",
        training_steps=10,
        sampling_steps=40,
        guidance_scale=4.5,
        lora_rank=32,
        microbatch_size=4,
        gradient_checkpointing=True,
    ),
    "FluxPipeline": FamilyEntry(
        "flux",
        "Flux",
        training_steps=6,
        sampling_steps=28,
        guidance_scale=3.5,
        lora_rank=32,
        microbatch_size=2,
        gradient_checkpointing=True,
    ),
    "ZImagePipeline": FamilyEntry(
        "zimage",
        "ZImage",
        training_steps=8,
        sampling_steps=8,
        guidance_scale=1.0,
        lora_rank=32,
        microbatch_size=2,
        gradient_checkpointing=True,
    ),
    "Flux2KleinPipeline": FamilyEntry(
        "flux2",
        "Flux2",
        training_steps=10,
        sampling_steps=50,
        guidance_scale=4.0,
        lora_rank=32,
        microbatch_size=2,
        gradient_checkpointing=True,
        edits_images=True,
    ),
    "SanaPipeline": FamilyEntry(
        "sana",
        "Sana",
        training_steps=10,
        sampling_steps=20,
        guidance_scale=4.5,
        lora_rank=32,
        microbatch_size=4,
        gradient_checkpointing=True,
        has_instruction=True,
    ),
    "QwenImagePipeline": FamilyEntry(
        "qwen_image",
        "QwenImage",
        training_steps=10,
        sampling_steps=50,
        guidance_scale=4.0,
        lora_rank=32,
        microbatch_size=1,
        gradient_checkpointing=True,
    ),
}
"""diffusers pipeline class -> its family. Steps, guidance and ranks are those of recipes/configs, as published with
DDPO (arXiv:2305.13301) and Flow-GRPO (arXiv:2505.05470); for Z-Image those of the turbo model's card;
for SANA guidance and sampling_steps are those of the stock pipeline, training_steps and rank those of SD 3;
for FLUX.2 klein and Qwen-Image guidance and sampling_steps are those of the base models' cards."""


def family_entry(pipeline_class: str) -> FamilyEntry:
    """Return the row of a diffusers pipeline class. Raises ValueError, listing those that are supported."""
    if pipeline_class not in FAMILIES:
        raise ValueError(f"The model is a {pipeline_class}; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[pipeline_class]


def same_model(one: str, other: str) -> bool:
    """Return True if two values of the option model name one model: the same name or Hub id, or paths of one folder."""
    return _location(one) == _location(other)


def _location(model: str) -> Path:
    return TOY_MODELS.get(model, Path(model).expanduser()).resolve()


def pipeline_class_of(model: str) -> str:
    """Return the name of the diffusers pipeline class of a model: a passed pipeline, a class, a folder or a Hub id.

    Raises FileNotFoundError or ValueError for a path that is not a pipeline.
    """
    if (pipeline := passed().pipelines.get(model)) is not None:
        return type(pipeline).__name__
    if model in FAMILIES:
        return model
    if (published := published_architecture(model)) is not None:
        return published["_class_name"]
    index = TOY_MODELS.get(model, Path(model)) / INDEX
    if index.is_file():
        with suppress(ValueError):  # `pipeline_index` says what is wrong with the file
            if name := read_object(index).get("_class_name"):
                return str(name)
    from rlhf_t2i.models.load import pipeline_index  # takes seconds; asks the Hub

    return pipeline_index(model)[1]["_class_name"]
