"""Attacks of `benchmarks/faults.py`: each module has functions that prepare and try one kind of fault."""
