"""The only room that knows megatron-core: the grid, the model, its weights, its checkpoints, and the verbs on top (policy.py)."""
