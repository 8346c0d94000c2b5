"""The promises of gae, kept by the kernels."""

from __future__ import annotations

from tests.support.check_gae import *  # noqa: F403
