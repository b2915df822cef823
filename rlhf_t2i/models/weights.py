"""Load trained weights into a pipeline: a LoRA, a full denoiser or a checkpoint; those of another model are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reward_model.text_files import read_object
from rlhf_t2i.distributed.state import stored_weights
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.lora import ADAPTER, LoraConfiguration, add_lora, has_lora
from rlhf_t2i.models.lora_files import find_lora, load_lora, load_text_encoder_loras, read_lora
from rlhf_t2i.models.table import same_model
from rlhf_t2i.output.run_folder import CONFIG, LORA_WEIGHTS, START, read_config, run_of


def load_weights(pipeline: Any, family: type[DiffusionPolicy], path: Path, *, model: str) -> None:
    """Load trained weights into the pipeline of `model`.

    `path` is the folder of a finished run, its exported `lora`, `unet` or `transformer`, one of its checkpoints, or a
    LoRA as in `find_lora`. A LoRA may be of another model if each of its weights finds a layer of its shape. Raises
    FileNotFoundError for a path without weights, and ValueError for weights that do not fit the model, and for a full
    denoiser of a run that trained another one.
    """
    network = getattr(pipeline, family.component)
    if stored := stored_weights(path):
        _load_checkpoint(network, family, stored, path, model=model)
        return
    if (folder := denoiser_folder(path, family.component)) is not None:
        check_run(path, model=model)
        load_denoiser(network, folder, model=model)
    elif (file := find_lora(path)) is not None:
        _load_run_start(network, family, path, model=model)
        lora = read_lora(file, family, network)
        load_lora(lora, network, model=model)
        load_text_encoder_loras(lora, pipeline, model=model)
    else:
        raise FileNotFoundError(
            f"{str(path)!r} holds no trained weights. Give a finished run's folder, the 'lora', 'unet' or 'transformer'"
            f" folder in it, one of its checkpoints, or a LoRA file."
        )


def _load_checkpoint(
    network: Any, family: type[DiffusionPolicy], stored: Mapping[str, Tensor], path: Path, *, model: str
) -> None:
    run = path.parent.parent
    config = read_config(run)
    lora = LoraConfiguration.from_options(config)
    if not config.get("init_lora") and lora is None:
        check_run(run, model=model)
    if config.get("init_lora") or lora is not None:
        _load_run_start(network, family, path, model=model)
    if config.get("init_lora"):
        load_lora(read_lora(run / START / "lora" / LORA_WEIGHTS, family, network), network, model=model)
    elif lora is not None:
        add_lora(network, lora, family.target_layers(network, lora.targets), seed=0)
    expected = {n: p for n, p in network.named_parameters() if not has_lora(network) or f".{ADAPTER}." in n}
    _check_fit(stored, expected, f"The checkpoint {str(path)!r}", model)
    network.load_state_dict(stored, strict=False)


def _load_run_start(network: Any, family: type[DiffusionPolicy], path: Path, *, model: str) -> None:
    """Load the full denoiser that the run which wrote a LoRA or a checkpoint started from, if not from the model's."""
    run = run_of(path)
    if run is None or not (source := read_config(run).get("init_weights")):
        return
    check_run(run, model=model)
    if (folder := denoiser_folder(Path(source), family.component)) is None:
        raise FileNotFoundError(
            f"{str(path)!r} is a LoRA of {source!r} (init_weights), where there is no denoiser now."
        )
    load_denoiser(network, folder, model=model)


def check_run(folder: Path, *, model: str) -> None:
    """Raise ValueError if a folder is that of a run which trained another model."""
    if not (folder / CONFIG).is_file():
        return
    trained = read_config(folder).get("model")
    if trained is not None and not same_model(trained, model):
        raise ValueError(
            f"The run {str(folder)!r} trained the model {trained!r}, not {model!r}: give that model. The folder of its "
            f"exported weights can be loaded into another model that they fit."
        )


def denoiser_folder(path: Path, component: str) -> Path | None:
    """Return the folder of a full denoiser: `path`, or `component` in it; None if there is none."""
    folders = (path, path / component)
    return next((f for f in folders if any(f.glob("diffusion_pytorch_model*.safetensors"))), None)


def load_denoiser(network: Any, folder: Path, *, model: str) -> None:
    """Load a full denoiser from its folder; ValueError if it is not one of `model`."""
    kind, config = type(network), folder / "config.json"
    found = read_object(config).get("_class_name") if config.is_file() else None
    if found not in (None, kind.__name__):
        raise ValueError(
            f"The denoiser {str(folder)!r} does not fit the model {model!r}: it is a {found}, not a {kind.__name__}."
        )
    trained = kind.from_pretrained(folder, dtype=network.dtype).state_dict()
    _check_fit(trained, network.state_dict(), f"The denoiser {str(folder)!r}", model)
    network.load_state_dict(trained)


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, model: str) -> None:
    """Raise ValueError unless weights have the names and shapes of those that they replace."""
    misfits = [name for name, weight in found.items() if name not in expected or weight.shape != expected[name].shape]
    if misfits:
        raise ValueError(
            f"{what} does not fit the model {model!r}: {len(misfits)} of its {len(found)} weights are not in the model "
            f"or have another shape there ({', '.join(misfits[:3])}). Give the model that it was trained on."
        )
    if lacking := sorted(expected.keys() - found.keys()):
        raise ValueError(
            f"{what} does not fit the model {model!r}: it lacks {len(lacking)} of the model's {len(expected)} weights "
            f"({', '.join(lacking[:3])}). Give the model that it was trained on."
        )
