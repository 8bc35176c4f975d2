"""The first implementation's names: argument order, permuted and interleaved weights, what is ignored and accepted."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sonicmoe
from sonicmoe import InvalidArgument, compat
from sonicmoe.compat import ActivationType, KernelBackendMoE, moe_general_routing_inputs, moe_TC_softmax_topk_layer

T, E, K, H, I = 11, 5, 2, 16, 12  # noqa: E741


def weights(gated: bool = True, bias: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    width = 2 * I if gated else I
    shapes = [(T, H), (E, H), (E, width, H), (E, width), (E, H, I), (E, H)]
    made = [torch.randn(s, dtype=torch.float64) / (s[-1] ** 0.5 if len(s) == 3 else 1) for s in shapes]
    return [t.requires_grad_() for t in made]


def expert(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, concat: bool) -> Tensor:
    h = x @ w1.T + b1
    gate, up = h.chunk(2, -1) if concat else (h[..., ::2], h[..., 1::2])
    return (F.silu(gate) * up) @ w2.T + b2


@pytest.mark.parametrize("concat", [False, True])
def test_top_k_layer(concat: bool) -> None:
    x, router, w1, b1, w2, b2 = weights()
    o, logits, frequency = moe_TC_softmax_topk_layer(
        x, router, w1.permute(1, 2, 0), b1, w2.permute(1, 2, 0), b2, K, 7, ActivationType.SWIGLU, False, concat
    )
    values, ids = (x @ router.T).topk(K, dim=1)
    want = torch.stack(
        [
            sum(s * expert(x[t], w1[e], b1[e], w2[e], b2[e], concat) for s, e in zip(p, i, strict=True))
            for t, (p, i) in enumerate(zip(values.softmax(1), ids, strict=True))
        ]
    )
    torch.testing.assert_close(logits, x @ router.T)
    torch.testing.assert_close(o, want)
    assert want.abs().max() > 0.1
    assert torch.equal(frequency, torch.bincount(ids.flatten(), minlength=E).int())
    leaves = (x, router, w1, b1, w2, b2)
    pattern = torch.linspace(-1, 1, H, dtype=torch.float64)
    got_grads, want_grads = (torch.autograd.grad((y * pattern).sum(), leaves) for y in (o, want))
    for got, wanted in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_pairs_in_any_order() -> None:
    x, _, w1, b1, w2, b2 = weights()
    tokens, experts = torch.tensor([4, 0, 9, 4, 4, 2, 0]), torch.tensor([1, 3, 3, 0, 1, E, 2])
    scores = torch.rand(7, dtype=torch.float64, requires_grad=True)
    views = (w1.permute(1, 2, 0), b1, w2.permute(1, 2, 0), b2)
    o, frequency = moe_general_routing_inputs(x, scores, tokens, experts, *views, E=E, stream_id=None)
    want = torch.zeros(T, H, dtype=torch.float64)
    for s, t, e in zip(scores, tokens, experts, strict=True):
        if e < E:
            want[t] += s * expert(x[t], w1[e], b1[e], w2[e], b2[e], concat=False)
    torch.testing.assert_close(o, want)
    assert frequency.tolist() == [1, 2, 1, 2, 0]
    (got,) = torch.autograd.grad(o.sum(), scores, retain_graph=True)
    (wanted,) = torch.autograd.grad(want.sum(), scores)
    torch.testing.assert_close(got, wanted)
    assert not moe_general_routing_inputs(x, scores, tokens, experts, *views, E, 0, "swiglu", True)[0].requires_grad


def test_argument_order() -> None:
    order = list(inspect.signature(moe_TC_softmax_topk_layer).parameters)
    assert order[:10] == "x router_w w1 b1 w2 b2 K stream_id activation_type is_inference_mode_enabled".split()
    order = list(inspect.signature(moe_general_routing_inputs).parameters)
    assert order[:8] == "x router_scores token_indices expert_indices w1 b1 w2 b2".split()
    assert order[8:12] == "E stream_id activation_type is_inference_mode_enabled".split()
    order = list(inspect.signature(compat.MoE).parameters)
    assert order[:4] == "num_experts num_experts_per_tok hidden_size intermediate_size".split()
    assert order[4:] == "activation_function add_bias std".split()


@pytest.mark.parametrize("activation", ActivationType)
def test_module(activation: ActivationType) -> None:
    torch.manual_seed(0)
    moe = compat.MoE(E, K, H, I, activation, add_bias=True, std=0.3).double()
    ours = sonicmoe.MoE(
        E, K, H, I, activation.activation, True, w1_layout=moe.w1_layout, backend="torch", dtype=torch.float64
    )
    ours.load_state_dict(moe.state_dict())
    x = torch.randn(T, H, dtype=torch.float64)
    for backend in (KernelBackendMoE.sonicmoe, KernelBackendMoE.torch):
        o, aux = moe(x, kernel_backend_moe=backend)
        assert torch.equal(o, ours(x)[0]) and torch.equal(aux, ours(x)[1]) and o.abs().max() > 0.01
    assert moe.w1_layout == ("interleaved" if ours.activation.gated else "concat")
    assert o.requires_grad and not moe(x, is_inference_mode=True)[0].requires_grad
    with pytest.raises(InvalidArgument, match="KernelBackendMoE"):
        moe(x, KernelBackendMoE.scattermoe)


def test_activations_that_it_does_not_have() -> None:
    x, router, w1, b1, w2, b2 = weights()
    views = (w1.permute(1, 2, 0), b1, w2.permute(1, 2, 0), b2)
    with pytest.raises(InvalidArgument, match="activation_type: got 'geglu_tanh', accepted one of swiglu, "):
        moe_TC_softmax_topk_layer(x, router, *views, K, 0, "geglu_tanh")
    with pytest.raises(InvalidArgument, match="activation_function: got 'mish'"):
        compat.MoE(E, K, H, I, "mish", add_bias=False, std=0.3)  # type: ignore[arg-type]


def test_weights_that_are_no_permuted_views_raise() -> None:
    x, router, w1, b1, w2, b2 = weights()
    with pytest.raises(InvalidArgument, match="contiguous"):
        moe_TC_softmax_topk_layer(x, router, w1.permute(1, 2, 0).contiguous(), b1, w2.permute(1, 2, 0), b2, K, 0)
