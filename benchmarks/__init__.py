"""Measurements. `engine` comes first: it refuses to go on with another distribution's triton_kernels."""

import engine  # noqa: F401
