"""How images are painted: a policy, a schedule and a way to step."""
