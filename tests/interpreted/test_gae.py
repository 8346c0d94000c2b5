"""The promises of gae, kept by the kernels."""

from __future__ import annotations

from tests.check_gae import *  # noqa: F403
