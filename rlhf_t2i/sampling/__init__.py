"""How pictures are painted: a policy, a schedule and a way to step."""
