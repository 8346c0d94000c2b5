"""The promises of dpo_norm and seq_logps, kept by the kernels."""

from __future__ import annotations

from tests.support.check_dpo import *  # noqa: F403
