"""Start the processes that `accelerate launch` configured, and distribute a network over them."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn

from rlhf_t2i.distributed.replicated import Replicated
from rlhf_t2i.distributed.types import Engine
from rlhf_t2i.distributed.watch import Watch, end_job

Mode = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def start_processes(mixed_precision: str | None, *, timeout: float = 0.0) -> tuple[Accelerator, Mode]:
    """Return accelerate's processes and the distribution strategy, from the launcher's environment variables.

    `timeout` is that of their collective calls in seconds; 0 is torch's. Raises ValueError for a
    strategy or precision that is not supported.
    """
    sharded = _wants_fsdp(os.environ)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = not torch.cuda.is_available()
    if deepspeed:
        _check_deepspeed(os.environ)
        prepare_deepspeed()
    if several and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        _reconnect(os.environ, on_cpu=on_cpu, timeout=_limit(timeout))
    # Without a GPU use gloo: DeepSpeed would compile a library of its own.
    backend = "gloo" if on_cpu and (several or deepspeed) else None
    group: list[Any] = [InitProcessGroupKwargs(backend=backend, timeout=_limit(timeout))] if several or backend else []
    # Trained weights are float32 beside activations in half precision, for which torch has no fused norm.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
    # With cpu=True accelerate ignores DeepSpeed, which uses the CPU anyway if there is no GPU.
    use_cpu = on_cpu and several and not deepspeed
    accelerator = Accelerator(cpu=use_cpu, mixed_precision=mixed_precision, kwargs_handlers=group)
    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(f"mixed_precision {accelerator.mixed_precision} is not supported; use {', '.join(DTYPES)}.")
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed's own calls cause these warnings, in every process.
        warnings.filterwarnings(
            "ignore", message=r".*is deprecated", category=FutureWarning, module="torch.distributed"
        )
        return accelerator, _zero_mode(accelerator)
    if deepspeed:
        raise RuntimeError(f"DeepSpeed was configured, but accelerate started {kind.value} processes.")
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(f"{kind.value} is not supported; launch with one of accelerate_configs/.")
    if sharded and accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision fp16 is not supported with FSDP2; use bf16 or no.")
    if kind == DistributedType.NO:
        return accelerator, "single"
    return accelerator, "fsdp2" if sharded else "ddp"


def prepare_deepspeed() -> None:
    """Tell DeepSpeed, if the launcher configured it, which device it uses.

    Without a GPU keep it from compiling a communication library for inference, which takes a minute.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    on_cpu = not torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
    if on_cpu:
        import deepspeed  # takes seconds

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def end_processes(accelerator: Accelerator) -> None:
    """Close trackers and the connections between processes.

    Waits half a second first: a gloo thread may still be freeing the tensors of the last exchange, for which it needs
    the GIL, and destroying the process group while holding the GIL would wait for that thread forever.
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
    log: Callable[[str], None],
) -> Engine:
    """Distribute a network over the processes; `optimizer` has not taken a step.

    Raises ValueError if DeepSpeed's config and the recipe disagree.
    """
    if mode in ("single", "ddp"):
        return Replicated(accelerator, network, optimizer, max_gradient_norm=max_gradient_norm)
    if mode == "fsdp2":
        from rlhf_t2i.distributed.fsdp import FullySharded

        return FullySharded(network, optimizer, max_gradient_norm=max_gradient_norm)
    from rlhf_t2i.distributed.zero import Zero, fill_config

    plugin: Any = accelerator.state.deepspeed_plugin
    config, filled = fill_config(
        plugin.deepspeed_config, max_gradient_norm=max_gradient_norm,
        mixed_precision=accelerator.mixed_precision, microbatch_size=microbatch_size,
    )  # fmt: skip
    plugin.deepspeed_config.clear()  # in place, because accelerate refers to the same dictionary elsewhere
    plugin.deepspeed_config.update(config)
    log("Filled into DeepSpeed's config: " + ", ".join(f"{name} {value}" for name, value in filled.items()))
    return Zero(accelerator, network, optimizer)


def watch_processes(accelerator: Accelerator, *, seconds: float) -> Watch | None:
    """Start to watch over the processes of a job, and return the watch; None for a single one, or if `seconds` is 0."""
    if accelerator.num_processes == 1 or not seconds:
        return None
    watch = Watch(
        _store(os.environ, "watch"), rank=accelerator.process_index, num_processes=accelerator.num_processes,
        seconds=seconds, end=end_job,
    )  # fmt: skip
    watch.start()
    return watch


def _limit(seconds: float) -> timedelta | None:
    return timedelta(seconds=seconds) if seconds else None


def _store(environment: Mapping[str, str], name: str) -> Any:
    """Return a connection to the store of a job's processes, with names of its own for each restart."""
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    prefix = f"{name}_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(prefix, store)  # pyright: ignore[reportPrivateImportUsage]


def _reconnect(environment: Mapping[str, str], *, on_cpu: bool, timeout: timedelta | None) -> None:
    """Connect processes that the launcher restarted.

    Its store still has the addresses of the processes before the restart, so the new ones use another prefix.
    """
    if not on_cpu:
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=_store(environment, "restart"),
        timeout=timeout,
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
    )


def uses_fsdp(environment: Mapping[str, str]) -> bool:
    """Return True if the launcher's environment variables configure FSDP, of which `PartialState` knows nothing."""
    return environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _wants_fsdp(environment: Any) -> bool:
    """True if FSDP is configured; the setting is removed, because accelerate does not support it on a CPU."""
    wanted = uses_fsdp(environment)
    environment.pop("ACCELERATE_USE_FSDP", None)
    if not wanted:
        return False
    if (version := environment.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"fsdp_version is {version}; only version 2 is supported (accelerate_configs/fsdp2.yaml).")
    if environment.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError("fsdp_offload_params is not supported; use accelerate_configs/deepspeed_zero3_offload.yaml.")
    return True


def _check_deepspeed(environment: Mapping[str, str]) -> None:
    if environment.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() == "true":
        raise ValueError(
            "zero3_init_flag is true, which would also shard the reward model while it is loaded; set it to false."
        )


def _zero_mode(accelerator: Accelerator) -> Mode:
    plugin: Any = accelerator.state.deepspeed_plugin
    stage: int = plugin.zero_stage
    modes: dict[int, Mode] = {1: "zero1", 2: "zero2", 3: "zero3"}
    if stage not in modes:
        raise ValueError(f"zero_stage is {stage}; use 1, 2 or 3, or DDP (accelerate_configs/ddp.yaml).")
    plugin.dschf = None  # or transformers would also load text encoders and reward models sharded
    return modes[stage]
