"""A run as a typed Python value: frozen dataclasses that validate themselves."""

from engine.config.model import Model, ModelShape, RopeScaling, padded_vocab
from engine.config.overrides import override
from engine.config.parallel import Parallel, Recompute, even_split
from engine.config.run import Logging, Optim, Run, step_folder, to_dict

__all__ = [
    "Logging",
    "Model",
    "ModelShape",
    "Optim",
    "Parallel",
    "Recompute",
    "RopeScaling",
    "Run",
    "even_split",
    "override",
    "padded_vocab",
    "step_folder",
    "to_dict",
]
