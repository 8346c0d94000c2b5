"""A run as a typed Python value: frozen dataclasses that check themselves."""

from engine.config.run import *  # noqa: F403
