"""Data: rows -> chat template -> memory-mapped corpus -> mixture of samples. Sample order is a pure function of the seed."""
