"""GAE over packed responses against the float64 loop, and what the op refuses."""

import pytest
import torch

import hybridrl.ops
from hybridrl.ops.gae import gae, gae_reference


def batch(lengths, seed=0, masked=0.3, offsets=torch.int32):
    generator = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(offsets)
    total = int(cu[-1])
    rewards, values = (torch.randn(total, generator=generator) for _ in range(2))
    mask = (torch.rand(total, generator=generator) >= masked).float()
    return rewards, values, mask, cu


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("lengths", [[1], [7, 0, 1, 300], [0, 0], [], [5000, 3, 20000, 0]])
def test_equals_the_loop(lengths, gamma, lam, offsets):
    inputs = batch(lengths, offsets=offsets)
    advantages, returns = gae(*inputs, gamma, lam)
    want_advantages, want_returns = gae_reference(*inputs, gamma, lam)
    scale = max(1.0, want_advantages.abs().max().item()) if want_advantages.numel() else 1.0
    torch.testing.assert_close(advantages.double(), want_advantages, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(returns.double(), want_returns, rtol=0, atol=1e-5 * scale)


def test_known_numbers():
    """By hand: two counting tokens around a tool's token; gamma 0.5, lambda 0.5."""
    rewards, values = torch.tensor([1.0, 100.0, 2.0]), torch.tensor([4.0, 50.0, 8.0])
    advantages, returns = gae(rewards, values, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 3]), 0.5, 0.5)
    # last: 2 - 8 = -6; the tool's carries it; first: 1 + 0.5 * 8 - 4 + 0.25 * -6 = -0.5
    assert advantages.tolist() == [-0.5, -6.0, -6.0]
    assert returns.tolist() == [3.5, 44.0, 2.0]


def test_equals_the_textbook_without_masks():
    """Against the definition as a double sum, A_t = sum_k (gamma lam)^k delta_{t+k}, which is not the recurrence."""
    rewards, values, _, cu = batch([40, 17])
    advantages, _ = gae(rewards, values, torch.ones_like(rewards), cu, 0.97, 0.9)
    r, v = rewards.double(), values.double()
    for begin, end in [(0, 40), (40, 57)]:
        following = torch.cat([v[begin + 1 : end], torch.zeros(1, dtype=torch.float64)])
        delta = r[begin:end] + 0.97 * following - v[begin:end]
        decay = (0.97 * 0.9) ** torch.arange(end - begin, dtype=torch.float64)
        want = torch.stack([(decay[: end - begin - t] * delta[t:]).sum() for t in range(end - begin)])
        torch.testing.assert_close(advantages[begin:end].double(), want, rtol=0, atol=1e-5)


def test_a_sequence_does_not_see_its_neighbours():
    rewards, values, mask, cu = batch([100, 5000, 40])
    whole, _ = gae(rewards, values, mask, cu, 0.99, 0.95)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        alone = [t[begin:end].contiguous() for t in (rewards, values, mask)]
        part, _ = gae(*alone, torch.tensor([0, end - begin]), 0.99, 0.95)
        assert torch.equal(part, whole[begin:end])


def test_threads_change_nothing():
    inputs = batch([3000] * 100 + [1, 0, 200_000], masked=0.1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            results.append(gae(*inputs, 1.0, 0.95))
    finally:
        torch.set_num_threads(before)
    for advantages, returns in results[1:]:
        assert torch.equal(advantages, results[0][0]) and torch.equal(returns, results[0][1])


def test_garbage_at_masked_tokens_does_not_spread():
    rewards, values, mask, cu = batch([50, 50])
    want, _ = gae(rewards, values, mask, cu, 0.99, 0.95)
    rewards[mask == 0], values[mask == 0] = float("nan"), float("inf")
    advantages, _ = gae(rewards, values, mask, cu, 0.99, 0.95)
    assert torch.equal(advantages, want)


def test_opcheck():
    torch.library.opcheck(gae, (*batch([5, 0, 9]), 0.99, 0.95))


@pytest.mark.parametrize("place, name", [(0, "rewards"), (1, "values"), (2, "mask"), (3, "cu_resp")])
def test_refuses_by_name(place, name):
    def refused(change, word):
        inputs = list(batch([4, 5]))
        inputs[place] = change(inputs[place])
        with pytest.raises(ValueError, match=rf"gae: {name} .*{word}"):
            gae(*inputs, 1.0, 1.0)

    refused(lambda t: t.double(), "must be (float32|int32 or int64)")
    refused(lambda t: torch.stack([t, t], 1)[:, 0], "must be contiguous")
    refused(lambda t: torch.stack([t, t]), "shape")
    if name not in ("rewards", "cu_resp"):
        refused(lambda t: t[:-1].clone(), "shape")


@pytest.mark.parametrize("cu", [[0, 4, 8], [1, 4, 9], [0, 5, 4, 9]])
def test_refuses_boundaries_that_do_not_fit(cu):
    rewards, values, mask, _ = batch([4, 5])
    with pytest.raises(ValueError, match="cu_resp must ascend from 0 to the number of response tokens, 9"):
        gae(rewards, values, mask, torch.tensor(cu), 1.0, 1.0)


def test_a_missing_build_says_how_to_build(monkeypatch):
    """The import system's own way of saying that a module is not there."""
    monkeypatch.delattr(hybridrl, "_C", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "hybridrl._C", None)
    with pytest.raises(ImportError, match="pip install --no-build-isolation -e ."):
        hybridrl.ops.native()
