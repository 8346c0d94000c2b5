"""Trainers of TRL around a tiny random model, of which a test replaces log-probs and rewards: TRL's losses and advantages in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.data.tokenizer import load_tokenizer

LONGEST = 8  # tokens of a response
PROMPT = {"prompt": "q"}


def tiny_model(folder: Path) -> LlamaForCausalLM:
    """Saved in `folder` too, where the trainers look for the reference model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=260
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def online_trainer(kind: str, out: Path, **settings: Any) -> Any:
    """TRL's GRPOTrainer or RLOOTrainer on CPU, in evaluation mode.

    Its attribute given_rewards, float64 [N], replaces the rewards of N responses; given_logprob, float64 [N, length], their log-probs.
    """
    import trl  # type: ignore[import-not-found]
    from datasets import Dataset

    parent = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}[kind]

    class Trainer(parent):
        given_rewards: Tensor
        given_logprob: Tensor | None = None

        def _calculate_rewards(self, *_: Any) -> Tensor:
            return self.given_rewards[:, None]

        def _get_per_token_logps_and_entropies(self, *args: Any, **how: Any) -> Any:
            if self.given_logprob is None:
                return super()._get_per_token_logps_and_entropies(*args, **how)
            return self.given_logprob, torch.zeros_like(self.given_logprob), None

    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig}[kind]
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_completion_length": LONGEST,
    }
    tokenizer = load_tokenizer("bytes")
    tokenizer.padding_side = "left"
    made = Trainer(
        tiny_model(out / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config(str(out), **defaults | settings),
        train_dataset=Dataset.from_list([PROMPT] * 8),
        processing_class=tokenizer,
    )
    made.model.eval()
    return made
