"""What to learn from and by which loss. Each file is one algorithm: a config whose `start` gives `collect(step)` and `loss`; none
knows another."""
