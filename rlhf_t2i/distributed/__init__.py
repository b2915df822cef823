"""What learns, spread over processes: one copy each (DDP), or in parts (DeepSpeed ZeRO, FSDP2)."""
