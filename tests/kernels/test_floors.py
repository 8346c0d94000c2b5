"""Lower bounds of kernel times against numbers computed by hand."""

from __future__ import annotations

import pytest

from benchmarks.kernels.floors import CHIPS, OPERATIONS, SHAPES, reaches

H100, H200, B200 = CHIPS


def milliseconds(operation: str, shape: str) -> float:
    return OPERATIONS[operation](SHAPES[shape]).floor(H200) * 1e3


def test_sustained_rates_have_the_efficiency_of_an_h200() -> None:
    assert H200.memory == pytest.approx(4.3e12)
    assert H200.matrix == H100.matrix == pytest.approx(790e12)
    assert H100.memory == pytest.approx(3.0e12, rel=1e-3)
    assert B200.matrix / B200.memory == pytest.approx(2250 / 8 * (790 / 989) / (4.3 / 4.8))


def test_logits_are_read_once_and_then_read_and_written() -> None:
    """8192 x 128256 bfloat16 logits are 2.10 GB: 0.49 ms at 4.3 TB/s."""
    assert milliseconds("logprob forward", "8b-tp1") == pytest.approx(0.489, rel=2e-3)
    assert milliseconds("logprob backward", "8b-tp1") == pytest.approx(0.977, rel=2e-3)
    assert milliseconds("logprob forward", "70b-tp8") == pytest.approx(0.489 / 8, rel=2e-3)


def test_the_output_layer_has_one_product_forward_and_three_in_total() -> None:
    """2 x 8192 x 4096 x 128256 FLOP are 10.9 ms at 790 TFLOP/s; on each of 8 ranks of 405B, four times as wide, half of that."""
    assert milliseconds("linear_logprob forward", "8b-tp1") == pytest.approx(10.9, rel=2e-3)
    assert milliseconds("linear_logprob forward and backward", "8b-tp1") == pytest.approx(32.7, rel=2e-3)
    assert milliseconds("linear_logprob forward and backward", "405b-tp8") == pytest.approx(16.3, rel=3e-3)
    assert milliseconds("linear_logprob forward and backward, recomputed", "405b-tp8") == pytest.approx(21.8, rel=3e-3)


def test_layers_move_each_tensor_once() -> None:
    """8192 x 4096 bfloat16 are 67.1 MB; a SwiGLU of 14336 reads two halves and writes one; rope reads and writes 40 heads
    of 128, and rope_qkv 8 more for values."""
    shape = SHAPES["8b-tp1"]
    assert OPERATIONS["rmsnorm forward fused"](shape).bytes == pytest.approx(4 * 67.1e6, rel=1e-3)
    assert OPERATIONS["swiglu forward"](shape).bytes == 3 * 8192 * 14336 * 2
    assert OPERATIONS["swiglu backward"](shape).bytes == 5 * 8192 * 14336 * 2
    assert OPERATIONS["rope"](shape).bytes == 2 * 8192 * 40 * 128 * 2 + 2 * 8192 * 128 * 2
    assert OPERATIONS["rope_qkv forward"](shape).bytes == 2 * 8192 * 48 * 128 * 2 + 8192 * 128 * 2
    assert OPERATIONS["rope_qkv backward"](SHAPES["405b-tp8"]).bytes == 2 * 8192 * 18 * 128 * 2 + 8192 * 128 * 2


def test_decoding_reads_the_attended_positions() -> None:
    """256 rows of 8 to 2048 positions, 1028 on average: 8 heads of 128 bfloat16 keys and values each."""
    assert sum(reaches()) == 256 * 1028
    assert OPERATIONS["decode_attention"](SHAPES["8b-tp1"]).bytes == 256 * (1028 * 2 * 8 * 128 * 2 + 2 * 32 * 128 * 2)


def test_what_limits_a_floor() -> None:
    assert [OPERATIONS[name](SHAPES["8b-tp1"]).bound(H200) for name in ("ppo_loss", "swiglu forward", "linear_logprob forward")] == [
        "launch",
        "memory",
        "compute",
    ]
