"""The only package that imports megatron-core: process groups, model, weights, checkpoints, generation, and Policy on top of them."""
