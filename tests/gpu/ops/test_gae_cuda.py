"""The CUDA kernel of GAE against the float64 loop and the CPU twin."""

import pytest
import torch

from hybridrl.ops.gae import gae, gae_reference

pytestmark = pytest.mark.gpu(1)


def batch(lengths, offsets=torch.int32, masked=0.3):
    generator = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(offsets)
    rewards, values = (torch.randn(int(cu[-1]), generator=generator) for _ in range(2))
    mask = (torch.rand(rewards.shape, generator=generator) >= masked).float()
    return rewards, values, mask, cu


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [7, 0, 1023, 1024, 1025], [5000, 3, 32768, 0], [60] * 3000])
def test_equals_the_loop(lengths, gamma, lam, offsets):
    inputs = batch(lengths, offsets)
    got = gae(*(t.cuda() for t in inputs), gamma, lam)
    for mine, twin, want in zip(got, gae(*inputs, gamma, lam), gae_reference(*inputs, gamma, lam), strict=True):
        atol = 1e-5 * max(1.0, want.abs().max().item()) if want.numel() else 0.0
        torch.testing.assert_close(mine.cpu().double(), want, rtol=0, atol=atol)
        torch.testing.assert_close(mine.cpu(), twin, rtol=0, atol=2 * atol)


def test_same_bits_again_and_alone():
    rewards, values, mask, cu = (t.cuda() for t in batch([100, 5000, 40, 2048]))
    whole, _ = gae(rewards, values, mask, cu, 0.99, 0.95)
    assert torch.equal(whole, gae(rewards, values, mask, cu, 0.99, 0.95)[0])
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        alone = [t[begin:end].clone() for t in (rewards, values, mask)]
        part, _ = gae(*alone, torch.tensor([0, end - begin], device="cuda"), 0.99, 0.95)
        assert torch.equal(part, whole[begin:end])


def test_in_a_cuda_graph():
    inputs = [t.cuda() for t in batch([300, 2000])]
    gae(*inputs, 0.99, 0.95)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gae(*inputs, 0.99, 0.95)
    inputs[0].neg_()
    graph.replay()
    want = gae(*inputs, 0.99, 0.95)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_opcheck():
    torch.library.opcheck(gae, (*(t.cuda() for t in batch([5, 0, 9])), 0.99, 0.95))
