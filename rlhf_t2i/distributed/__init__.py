"""A trained network and its optimiser on several processes, behind one interface: replicated (DDP) or sharded
(DeepSpeed ZeRO, FSDP2), and how much memory each of these needs."""
