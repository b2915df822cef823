"""Any reward behind HTTP, for trainers on other machines.

Here belong the server, its dynamic batching and its metrics; the wire format is rlhf_t2i/rewards/wire_format.py.
"""
