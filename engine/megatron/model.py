"""A Llama as megatron-core's GPTModel, with our packed attention and a last stage that returns log-probs or values instead of logits."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.config import ModelShape, Parallel, padded_vocab
from engine.distributed.world import World
from engine.megatron.activation import SwiGLU, Unchanged
from engine.megatron.attention import PackedAttention, PackedForward, PackedSelfAttention, attend_for
from engine.megatron.backend import Grid
from engine.megatron.layer import FinalNorm, Layer, RMSNorm
from engine.megatron.linear import ColumnLinear, RecomputingLinear, RowLinear
from engine.megatron.weight_gradient import Accumulated
from engine.types import TokenTerms
from triton_kernels import draw, linear_logprob, linear_policy_loss, logprob
from triton_kernels.linear_logprob import multiply

SAVED_LOGITS_BYTES = 1 << 30  # above it, the last stage recomputes its logits in backward instead of saving them


def transformer_config(model: ModelShape, parallel: Parallel, world: World, dtype: torch.dtype, learns: bool) -> TransformerConfig:
    """megatron's configuration of `model` on this grid. Weights stay uninitialized; weights.py fills all of them.

    learns: the model gets an optimizer, and with it the main_grad buffers of optimizers.wrap_ddp.
    """
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method=_no_init,
        output_layer_init_method=_no_init,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        sequence_parallel=parallel.tp > 1,
        tp_comm_overlap=parallel.tp_comm_overlap and parallel.tp > 1,
        variable_seq_lengths=parallel.pp > 1 and parallel.vpp == 1,
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, for dense models too
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=world.backend != "cpu",  # gloo may still be sending the buffer
        gradient_accumulation_fusion=learns,  # into main_grad, which only exists after optimizers.wrap_ddp
        bias_activation_fusion=False,
        use_te_activation_func=True,  # use the activation module of the layer spec, which is our SwiGLU
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_stages(parallel),
        **_recompute(parallel),
    )


def _no_init(weight: Tensor) -> None:
    """Leaves the weight uninitialized: weights.py fills it, and meta tensors have no values."""


def _stages(parallel: Parallel) -> dict[str, Any]:
    virtual = parallel.vpp if parallel.vpp > 1 else None
    if not parallel.stages:
        return {
            "virtual_pipeline_model_parallel_size": virtual,
            "account_for_embedding_in_pipeline_split": parallel.count_embedding,
            "account_for_loss_in_pipeline_split": parallel.count_loss,
        }
    layout = [["decoder"] * layers for layers in parallel.stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return {"pipeline_model_parallel_layout": layout}


def _recompute(parallel: Parallel) -> dict[str, Any]:
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.recompute == "selective":  # the MLP: with flash attention, recomputing attention would save nothing
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    return {}


class PackedModel(GPTModel):
    """GPTModel whose last stage returns one number per token (see the subclasses) instead of logits."""

    def _postprocess(
        self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor | None, *_: Any, **kwargs: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        return self.output_layer(hidden_states, labels, kwargs["packed_seq_params"])


class LogprobModel(PackedModel):
    """A language model. Its last stage returns logprob_T, computed from hidden states without materializing logits for all tokens."""

    def __init__(self, vocab_valid: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.vocab_valid = vocab_valid
        if self.post_process:
            # Called as a module, because megatron's pre-forward hook gathers the layer's weight.
            self.output_layer.forward = self._head  # type: ignore[method-assign,assignment]

    def _head(self, hidden_states: Tensor, labels: Tensor | None, packed_forward: PackedForward) -> Tensor:
        """The output of the last stage:

        training     logprob_T of the labels [1, T]; with packed_forward.entropy [2, T], entropy_T in the second row
        token loss   if packed_forward.terms is given, see _token_loss
        generation   without labels, the token sampled after each of rows_M and its log-prob, float64 [2, R]
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight is not None
        weight_grad = getattr(weight, "main_grad", None)  # set by optimizers.wrap_ddp
        if weight_grad is not None:
            weight = Accumulated.apply(weight, tied and self.pre_process)
        tp = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=tp)
        vocabulary = Vocabulary(tp.group_name if tp.size() > 1 else "", tp.rank() * len(weight), self.vocab_valid)
        if labels is None:
            return _sampled(hidden_states[:, 0], weight, packed_forward, vocabulary)
        if packed_forward.terms is not None:
            return _token_loss(hidden_states[:, 0], weight, labels[0], packed_forward, packed_forward.terms, vocabulary, weight_grad)
        logprob_T, entropy_T, _ = linear_logprob(
            hidden_states[:, 0],
            weight,
            labels[0],
            rows=packed_forward.rows_M,
            **vocabulary._asdict(),
            inv_temp=packed_forward.inv_temp,
            entropy=packed_forward.entropy,
            mode="save" if len(packed_forward.rows_M) * len(weight) * 4 <= SAVED_LOGITS_BYTES else "recompute",
            weight_grad=weight_grad,
        )
        return logprob_T if entropy_T is None else torch.stack([logprob_T, entropy_T])


class Vocabulary(NamedTuple):
    """This rank's shard of the vocabulary, as arguments of the kernels."""

    group: str
    vocab_start: int
    vocab_valid: int


def _sampled(hidden_TD: Tensor, weight: Tensor, packed_forward: PackedForward, vocabulary: Vocabulary) -> Tensor:
    hidden_RD = hidden_TD[packed_forward.rows_M]
    logits_RV = weight.new_empty((len(hidden_RD), len(weight)), dtype=torch.float32)
    multiply(logits_RV, hidden_RD, weight.T)
    sampling, keys_R2 = packed_forward.kv_write.sampling, packed_forward.kv_write.keys_R2
    token_R = draw(logits_RV, keys_R2, **asdict(sampling), **vocabulary._asdict())
    logp_R = logprob(logits_RV, token_R, **vocabulary._asdict(), inv_temp=1 / (sampling.temperature or 1.0))[0]
    return torch.stack([token_R.double(), logp_R.double()])


def _token_loss(
    hidden_TD: Tensor,
    weight: Tensor,
    target_T: Tensor,
    packed_forward: PackedForward,
    terms: TokenTerms,
    vocabulary: Vocabulary,
    weight_grad: Tensor | None,
) -> Tensor:
    """The total of the loss, then logprob_T, then entropy_T with packed_forward.entropy: [1 + T] or [1 + 2 T]. Only the total has a
    gradient."""
    total, *stats = linear_policy_loss(
        hidden_TD,
        weight,
        target_T,
        terms.weight_T,
        old_logp_N=terms.old_logprob_T,
        advantage_N=terms.advantage_T,
        ref_logp_N=terms.ref_logprob_T,
        clip_low=terms.clip_low,
        clip_high=terms.clip_high,
        kl=terms.kl,
        kl_coef=terms.kl_coef,
        rows=packed_forward.rows_M,
        **vocabulary._asdict(),
        inv_temp=packed_forward.inv_temp,
        entropy=packed_forward.entropy,
        weight_grad=weight_grad,
    )
    return torch.cat([total[None], *(stat for stat in stats if stat is not None)])


class ScalarHead(MegatronModule):
    """value_T = hidden_TD @ weight_D in fp32, with the same weight on every tensor-parallel rank.

    With sequence parallelism each rank computes the values of its tokens, and only the values are gathered: one number per token.
    """

    def __init__(self, config: TransformerConfig, device: torch.device, tp: ProcessGroup):
        super().__init__(config)
        self.tp = tp
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=device))
        # As for the norms, each rank sees only its own tokens; megatron sums the gradients over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, labels: Tensor | None, packed_forward: PackedForward) -> Tensor:
        value_T = F.linear(hidden_states[:, 0].float(), self.weight.float())[:, 0]
        if not self.config.sequence_parallel:
            return value_T
        # Every rank computes the whole loss, so backward splits the gradient instead of summing it.
        return gather_from_sequence_parallel_region(value_T, tensor_parallel_output_grad=False, group=self.tp)


class ValueModel(PackedModel):
    """A model with a scalar head instead of the output layer. Its last stage returns value_T, fp32."""

    def __init__(self, device: torch.device, **kwargs: Any):
        super().__init__(**kwargs)
        if self.post_process:
            self.output_layer = ScalarHead(self.config, device, self.pg_collection.tp)


def build(model: ModelShape, parallel: Parallel, grid: Grid, world: World, dtype: torch.dtype, *, learns: bool) -> list[PackedModel]:
    """This rank's stages of `model`, one per virtual stage. Call it inside backend.cpu_backend, after make_grid.

    learns: as in transformer_config
    """
    config = transformer_config(model, parallel, world, dtype, learns)
    return [_build_stage(model, parallel, grid, world, config, stage) for stage in range(parallel.vpp)]


def _build_stage(model: ModelShape, parallel: Parallel, grid: Grid, world: World, config: TransformerConfig, stage: int) -> PackedModel:
    vp_stage = stage if parallel.vpp > 1 else None
    last = grid.pp_rank == grid.pp - 1 and stage == parallel.vpp - 1
    model_class: Any = partial(LogprobModel, model.vocab) if model.head == "lm" else partial(ValueModel, world.device)
    return model_class(
        config=config,
        transformer_layer_spec=_layers(config, world, vp_stage, last=last, recomputes_swiglu=parallel.recompute == "swiglu"),
        vocab_size=padded_vocab(model.vocab, parallel.tp),
        max_sequence_length=model.max_length,
        pre_process=grid.pp_rank == 0 and stage == 0,
        post_process=last,
        position_embedding_type="none",
        share_embeddings_and_output_weights=model.tied,
        vp_stage=vp_stage,
    )


def _submodules(spec: Any) -> Any:
    """The submodules of a spec: a ModuleSpec, or since megatron-core 0.17 a functools.partial."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def _layers(
    config: TransformerConfig, world: World, vp_stage: int | None, *, last: bool, recomputes_swiglu: bool
) -> TransformerBlockSubmodules:
    """The layer specs of one stage; `last`: it ends with the final norm."""
    layer: Any = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    norm, final = (ModuleSpec(module=kind, params={"device": world.device}) for kind in (RMSNorm, FinalNorm))
    layer.module = Layer
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    mlp, attention = _submodules(layer.submodules.mlp), layer.submodules.self_attention.submodules
    mlp.activation_func = SwiGLU
    if config.tp_comm_overlap:
        mlp.linear_fc1 = attention.linear_qkv = ColumnLinear
        mlp.linear_fc2 = attention.linear_proj = RowLinear
    if recomputes_swiglu:
        mlp.activation_func, mlp.linear_fc2 = Unchanged, RecomputingLinear
    layer.submodules.self_attention.module = PackedSelfAttention
    attention.core_attention = ModuleSpec(module=PackedAttention, params={"attend": attend_for(world.on_gpu)})
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    added = [config.recompute_granularity == "full" or (i == count - 1 and not last) for i in range(count)]
    layers = [replace(layer, params={"adds": adds}) for adds in added]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final)
