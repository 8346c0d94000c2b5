"""The data room: rows -> chat template -> memory-mapped corpus -> mixture of samples. Every order it gives is a function of a seed."""
