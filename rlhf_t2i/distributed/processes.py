"""Set up the processes as `accelerate launch` was told to, and spread a network over them."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn

from rlhf_t2i.distributed.replicated import Replicated
from rlhf_t2i.distributed.types import Engine

Mode = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def start_processes(mixed_precision: str | None) -> tuple[Accelerator, Mode]:
    """The processes, and how they will share what learns: read from the environment that the launcher made.

    Raises ValueError for a way that is not supported, naming it.
    """
    sharded = _wants_fsdp(os.environ)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = not torch.cuda.is_available()
    if deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
        _check_deepspeed(os.environ)
        if on_cpu:
            _compile_nothing()
    if several and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        _meet_again(os.environ, on_cpu=on_cpu)
    # Without a GPU, gloo: DeepSpeed would compile a library of its own.
    gloo: list[Any] = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and (several or deepspeed) else []
    # accelerate forgets DeepSpeed where it is told to use the CPU; without a GPU it does that anyway.
    use_cpu = on_cpu and several and not deepspeed
    accelerator = Accelerator(cpu=use_cpu, mixed_precision=mixed_precision, kwargs_handlers=gloo)
    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(f"mixed_precision {accelerator.mixed_precision} is not supported; use {', '.join(DTYPES)}.")
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Of DeepSpeed's own calls, in every process, and for nobody here to change.
        warnings.filterwarnings(
            "ignore", message=r".*is deprecated", category=FutureWarning, module="torch.distributed"
        )
        return accelerator, _zero_mode(accelerator)
    if deepspeed:
        raise RuntimeError(f"DeepSpeed was asked for, and accelerate made the processes {kind.value} instead.")
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(f"{kind.value} is not supported; launch with one of accelerate_configs/.")
    if sharded and accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision fp16 is not supported with FSDP2; use bf16 or no.")
    if kind == DistributedType.NO:
        return accelerator, "single"
    return accelerator, "fsdp2" if sharded else "ddp"


def end_processes(accelerator: Accelerator) -> None:
    """Close trackers and the connections between processes.

    A thread of gloo may still be dropping the tensors of the last exchange, for which it needs the GIL; whoever takes
    gloo apart meanwhile, holding the GIL, waits for that thread forever. So it is given time.
    """
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        time.sleep(0.5)
    accelerator.end_training()


def make_engine(
    accelerator: Accelerator,
    mode: Mode,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    max_gradient_norm: float,
    microbatch_size: int,
    say: Callable[[str], None],
) -> Engine:
    """Spread a network over the processes; `optimizer` is AdamW and has not taken a step.

    Raises ValueError if DeepSpeed's config and the recipe disagree.
    """
    if mode in ("single", "ddp"):
        return Replicated(accelerator, network, optimizer, max_gradient_norm=max_gradient_norm)
    if mode == "fsdp2":
        from rlhf_t2i.distributed.fsdp import FullySharded

        return FullySharded(network, optimizer, max_gradient_norm=max_gradient_norm)
    from rlhf_t2i.distributed.zero import Zero, reconciled

    plugin: Any = accelerator.state.deepspeed_plugin
    config, filled = reconciled(
        plugin.deepspeed_config, max_gradient_norm=max_gradient_norm,
        mixed_precision=accelerator.mixed_precision, microbatch_size=microbatch_size,
    )  # fmt: skip
    plugin.deepspeed_config.clear()  # accelerate has the same dictionary elsewhere too
    plugin.deepspeed_config.update(config)
    say("Filled into DeepSpeed's config: " + ", ".join(f"{name} {value}" for name, value in filled.items()))
    return Zero(accelerator, network, optimizer)


def _meet_again(environment: Mapping[str, str], *, on_cpu: bool) -> None:
    """Connect processes that the launcher has restarted.

    Its store still says where those before them could be reached, so they look for one another under other names.
    """
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    if not on_cpu:
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    prefix = f"restart_{environment['TORCHELASTIC_RESTART_COUNT']}"
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=dist.PrefixStore(prefix, store),  # pyright: ignore[reportPrivateImportUsage]
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
    )


def _wants_fsdp(environment: Any) -> bool:
    """Whether FSDP was asked for; accelerate, which refuses it on a CPU, is not told of it."""
    if environment.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if (version := environment.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"fsdp_version is {version}; only version 2 is supported (accelerate_configs/fsdp2.yaml).")
    if environment.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError("fsdp_offload_params is not supported; use accelerate_configs/deepspeed_zero3_offload.yaml.")
    return True


def _compile_nothing() -> None:
    """DeepSpeed on a CPU begins by compiling a library for exchanges in inference, which takes a minute of a core."""
    import deepspeed  # takes seconds

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_deepspeed(environment: Mapping[str, str]) -> None:
    if environment.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() == "true":
        raise ValueError(
            "zero3_init_flag is true, which would also cut the judge into parts while it is loaded; set it to false."
        )


def _zero_mode(accelerator: Accelerator) -> Mode:
    plugin: Any = accelerator.state.deepspeed_plugin
    stage: int = plugin.zero_stage
    modes: dict[int, Mode] = {1: "zero1", 2: "zero2", 3: "zero3"}
    if stage not in modes:
        raise ValueError(f"zero_stage is {stage}; use 1, 2 or 3, or DDP (accelerate_configs/ddp.yaml).")
    plugin.dschf = None  # or transformers, which looks there, would load text encoder and judge in parts too
    return modes[stage]
