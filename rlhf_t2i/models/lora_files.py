"""LoRA files: read in the key layouts that diffusers knows, and refused unless every weight finds its layer."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers import StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.lora import ADAPTER, set_lora_weights
from rlhf_t2i.models.pipeline_parts import first_line
from rlhf_t2i.output.run_folder import LORA_WEIGHTS


@dataclass(frozen=True, slots=True)
class LoraFile:
    """The content of a LoRA file, converted by diffusers."""

    file: Path
    component: Literal["unet", "transformer"]
    """The denoiser's name."""
    weights: dict[str, Tensor]
    """Weights by name, `COMPONENT.LAYER.lora_A.weight` or in one of diffusers' older layouts."""
    alphas: dict[str, Any] | None
    """LoRA alpha of each layer, where the layout has them (Kohya's)."""
    metadata: dict[str, Any] | None
    """Fields of peft's LoraConfig, `COMPONENT.FIELD`, where the file has them."""

    @property
    def of_denoiser(self) -> dict[str, Tensor]:
        """Weights of the denoiser under peft's names, `LAYER.lora_A.weight`."""
        prefix = f"{self.component}."
        own = {key.removeprefix(prefix): weight for key, weight in self.weights.items() if key.startswith(prefix)}
        return convert_unet_state_dict_to_peft(own)

    @property
    def other_parts(self) -> list[str]:
        """First components of all other names: text encoders, or what no pipeline has."""
        return sorted({key.partition(".")[0] for key in self.weights} - {self.component})


def find_lora(path: Path) -> Path | None:
    """Return the LoRA file that a path stands for, None if there is none.

    A path is a .safetensors file, a folder with pytorch_lora_weights.safetensors or one other LoRA, a run folder, which
    has the former in `lora`, or a Hub id, OWNER/NAME or OWNER/NAME/FILE. Raises FileNotFoundError for a Hub id whose
    file cannot be downloaded.
    """
    if path.is_file():
        return path
    for folder in (path, path / "lora"):
        if (folder / LORA_WEIGHTS).is_file():
            return folder / LORA_WEIGHTS
    if path.exists():
        loras = [file for file in sorted(path.glob("*.safetensors")) if any("lora" in key for key in _keys(file))]
        return loras[0] if len(loras) == 1 else None
    is_hub_id = len(path.parts) in (2, 3) and not str(path).startswith((".", "/", "~"))
    return _downloaded(*path.parts) if is_hub_id else None


def _downloaded(owner: str, name: str, file: str = LORA_WEIGHTS) -> Path:
    from transformers.utils.hub import cached_file  # takes seconds

    try:
        return Path(str(cached_file(f"{owner}/{name}", file)))
    except OSError as error:
        raise FileNotFoundError(
            f"There is no folder {owner}/{name}, and the LoRA could not be loaded from the Hub "
            f"({first_line(error)}). A LoRA with another file name than {file} is OWNER/NAME/FILE."
        ) from error


def _keys(file: Path) -> list[str]:
    """Return the names in a safetensors file; ValueError for one that is damaged."""
    try:
        with safe_open(file, framework="pt") as content:
            return list(content.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights {str(file)!r} are damaged or no safetensors: {first_line(error)}.") from error


def read_lora(file: Path, family: type[DiffusionPolicy], network: Any) -> LoraFile:
    """Read a LoRA with the converters of a family's pipeline; `network` is the denoiser that it is for.

    Raises ValueError for a file that cannot be read, or has weights that diffusers would ignore.
    """
    for mark, kind in (("dora_scale", "a DoRA in Kohya's layout"), ("lokr_", "a LoKr"), ("hada_", "a LoHa")):
        if any(mark in key for key in _keys(file)):
            raise ValueError(f"{str(file)!r} is {kind}, which is not supported; give a LoRA.")
    # Only SDXL's converter maps the names of Kohya's own U-Net, as in the stock pipelines.
    is_sdxl = issubclass(family.pipeline_class, StableDiffusionXLPipeline)
    try:
        weights, *alphas, metadata = family.pipeline_class.lora_state_dict(
            str(file), use_safetensors=True, return_alphas=True, return_lora_metadata=True,
            **({"unet_config": network.config} if is_sdxl else {}),
        )  # fmt: skip
    except Exception as error:  # the converters raise anything for names that they do not know
        raise ValueError(
            f"The LoRA {str(file)!r} could not be read as one of {family.title}: {first_line(error)}"
        ) from error
    # diffusers applies alphas that differ from layer to layer under peft's names only.
    given = (alphas[0] if alphas else None) or {}
    of_denoiser = {key: alpha for key, alpha in given.items() if key.startswith(f"{family.component}.")}
    renamed = {
        **{k: a for k, a in given.items() if k not in of_denoiser},
        **convert_unet_state_dict_to_peft(of_denoiser),
    }
    return LoraFile(file, family.component, weights, renamed or None, metadata)


def load_lora(lora: LoraFile, network: Any, *, model: str) -> None:
    """Load a LoRA's weights of the denoiser into it, as the adapter "default", in float32 as it is trained.

    Raises ValueError, naming the file, some of its weights and the model, unless every weight finds a layer of its
    shape.
    """
    weights = lora.of_denoiser
    misfits = [name for name in weights if not _fits(name, weights[name], network)]
    if misfits or not weights:
        raise _does_not_fit(lora, misfits or [f"none is of the {lora.component}"], model)
    downs, ups = ({name.partition(".lora_")[0] for name in weights if f".lora_{part}." in name} for part in "AB")
    if incomplete := sorted(downs ^ ups):
        raise ValueError(
            f"The LoRA {str(lora.file)!r} is incomplete: {incomplete[0]} has one of lora_A and lora_B only."
        )
    network.load_lora_adapter(
        lora.weights, prefix=lora.component, adapter_name=ADAPTER, network_alphas=lora.alphas, metadata=lora.metadata
    )
    for name, parameter in network.named_parameters():
        if f".{ADAPTER}." in name:
            parameter.data = parameter.data.float()
    set_lora_weights(network, weights)  # again, because loading rounded them to the denoiser's precision


def load_text_encoder_loras(lora: LoraFile, pipeline: Any, *, model: str) -> None:
    """Load a LoRA's weights of text encoders into those of a pipeline; ValueError as in `load_lora`."""
    for part in lora.other_parts:
        encoder, expected = getattr(pipeline, part, None), [key for key in lora.weights if key.startswith(f"{part}.")]
        if encoder is None:
            raise _does_not_fit(lora, expected, model)
        try:
            pipeline.load_lora_into_text_encoder(
                lora.weights, lora.alphas, encoder, prefix=part, lora_scale=1.0, adapter_name=ADAPTER,
                metadata=lora.metadata,
            )  # fmt: skip
        except Exception as error:  # of peft, torch and transformers
            raise _does_not_fit(lora, expected, model) from error
        if sum(".lora_" in key for key, _ in encoder.named_parameters()) != len(expected):
            raise _does_not_fit(lora, expected, model)


def _fits(name: str, weight: Tensor, denoiser: nn.Module) -> bool:
    """True if a denoiser has the layer of a LoRA weight, with the inputs (A) or outputs (B, bias, magnitude) of it."""
    layer_name, _, part = name.partition(".lora_")
    try:
        layer = denoiser.get_submodule(layer_name).weight
    except AttributeError:
        return False
    if not isinstance(layer, Tensor):
        return False
    if part == "A.weight":
        return weight.shape[1:] == layer.shape[1:]
    outputs = weight.shape[:1] if part == "B.weight" else (weight.numel(),)
    return tuple(outputs) == tuple(layer.shape[:1])


def _does_not_fit(lora: LoraFile, misfits: Sequence[str], model: str) -> ValueError:
    return ValueError(
        f"The LoRA {str(lora.file)!r} does not fit the model {model!r}: of its {len(lora.weights)} weights, "
        f"{len(misfits)} find no layer of their shape ({', '.join(misfits[:3])}). Give its own model."
    )
