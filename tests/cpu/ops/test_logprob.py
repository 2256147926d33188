"""ops.logprob.from_hidden against float64, over vocabulary shards, at the edges, and in memory."""

import helpers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridrl.ops import logprob
from hybridrl.ops.logprob import VocabShard

VOCAB, HIDDEN = 67, 24


def problem(rows: int, scale: float = 1.0, seed: int = 0, vocab: int = VOCAB):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    weight = torch.randn(vocab, HIDDEN, generator=generator) * scale
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden, weight, targets


def with_gradients(function, hidden, weight, *args):
    """(logprob, entropy, gradient to hidden, to weight) for fixed random incoming gradients of both outputs."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    values, entropy = function(hidden, weight, *args)
    generator = torch.Generator().manual_seed(9)
    g_l, g_h = (torch.randn(values.shape, generator=generator).to(values.dtype) for _ in range(2))
    torch.autograd.backward([values, entropy], [g_l, g_h])
    return values.detach(), entropy.detach(), hidden.grad, weight.grad


def assert_equal_to_reference(found, hidden, weight, targets, temperature, tolerance=1e-5):
    expected = with_gradients(logprob.reference, hidden, weight, targets, temperature)
    for name, a, b in zip(("logprob", "entropy", "grad hidden", "grad weight"), found, expected, strict=True):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1.0)
        assert error < tolerance, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_equals_float64(rows, temperature):
    hidden, weight, targets = problem(rows)
    targets[0] = VOCAB - 1
    found = with_gradients(logprob.from_hidden, hidden, weight, targets, temperature, VocabShard(0, VOCAB))
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_equal_to_reference(found, hidden, weight, targets, temperature)


def test_gradient_equals_finite_differences():
    """An oracle that shares no formula: central differences in float64 of the reference's values."""
    hidden, weight, targets = problem(3)
    _, _, grad, _ = with_gradients(logprob.from_hidden, hidden, weight, targets, 0.7, VocabShard(0, VOCAB))
    generator = torch.Generator().manual_seed(9)
    g_l, g_h = torch.randn(3, generator=generator).double(), torch.randn(3, generator=generator).double()

    def total(h):
        values, entropy = logprob.reference(h, weight, targets, 0.7)
        return (g_l * values + g_h * entropy).sum()

    for i, j in ((0, 0), (1, 7), (2, 23)):
        step = torch.zeros_like(hidden, dtype=torch.float64)
        step[i, j] = 1e-5
        numeric = (total(hidden.double() + step) - total(hidden.double() - step)) / 2e-5
        assert float(grad[i, j]) == pytest.approx(float(numeric), rel=1e-4, abs=1e-5)


def test_chunks_join(monkeypatch):
    hidden, weight, targets = problem(100)
    monkeypatch.setattr(logprob, "CHUNK_TOKENS", 7)
    found = with_gradients(logprob.from_hidden, hidden, weight, targets, 0.9, VocabShard(0, VOCAB))
    assert_equal_to_reference(found, hidden, weight, targets, 0.9)


@pytest.mark.parametrize("garbage", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("entropy_gradient", [0.0, 1e-3, 50.0])
def test_padded_rows_never_count(garbage, entropy_gradient):
    hidden, weight, targets = problem(9)
    targets[0] = VOCAB - 1
    padded = torch.cat([weight, torch.full((5, HIDDEN), garbage)])
    found = []
    for rows in (weight, padded):
        h, w = hidden.clone().requires_grad_(), rows.clone().requires_grad_()
        values, entropy = logprob.from_hidden(h, w, targets, 0.8, VocabShard(0, VOCAB))
        (values.sum() + entropy_gradient * entropy.sum()).backward()
        found.append((values.detach(), entropy.detach(), h.grad, w.grad[:VOCAB]))
    assert torch.equal(w.grad[VOCAB:], torch.zeros(5, HIDDEN))
    for plain, got in zip(*found, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


def from_logits(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0):
    """Drives the op to given logits [R, V] exactly: hidden are rows of the identity."""
    hidden = torch.eye(logits.shape[0])
    shard = VocabShard(0, logits.shape[1])
    return with_gradients(logprob.from_hidden, hidden, logits.t().contiguous(), targets, temperature, shard), hidden


@pytest.mark.parametrize("offset,spread", [(3e4, 2.0), (-3e4, 2.0), (-150.0, 20.0), (0.0, 3e4), (0.0, 1e-3)])
def test_extreme_logits(offset, spread):
    """Large logits of either sign, all below -100, and spreads that overflow exp: still float64's values to 1e-5."""
    generator = torch.Generator().manual_seed(3)
    # Exact in fp32 (multiples of 2**-9), so that what is measured is the op and not the rounding of its input.
    logits = ((torch.randn(8, VOCAB, generator=generator) * spread + offset) * 512).round() / 512
    targets = logits.argsort(dim=1)[torch.arange(8), torch.tensor([-1, -2, -3, 0, 1, 5, 10, -1])]
    found, hidden = from_logits(logits, targets)
    assert all(torch.isfinite(x).all() for x in found)
    expected = with_gradients(logprob.reference, hidden, logits.t().contiguous(), targets, 1.0)
    for name, a, b in zip(("logprob", "entropy"), found, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=1e-5)


def test_uniform_and_certain_distributions():
    found, _ = from_logits(torch.zeros(2, VOCAB), torch.tensor([0, VOCAB - 1]))
    torch.testing.assert_close(found[0], torch.full((2,), -torch.tensor(float(VOCAB)).log().item()))
    torch.testing.assert_close(found[1], -found[0])
    sure = torch.zeros(1, VOCAB)
    sure[0, 3] = 200.0
    found, _ = from_logits(sure, torch.tensor([3]))
    assert found[0].item() == 0.0 and found[1].item() == 0.0


def test_no_rows():
    hidden, weight, targets = problem(0)
    values, entropy, grad_hidden, grad_weight = with_gradients(
        logprob.from_hidden, hidden, weight, targets, 1.0, VocabShard(0, VOCAB))
    assert values.shape == entropy.shape == (0,) and grad_hidden.shape == (0, HIDDEN)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_only_one_output_has_a_gradient():
    hidden, weight, targets = problem(6)
    for pick in (0, 1):
        grads = []
        for function, extra in ((logprob.from_hidden, (VocabShard(0, VOCAB),)), (logprob.reference, ())):
            leaf = hidden.clone().requires_grad_()
            function(leaf, weight, targets, 1.3, *extra)[pick].sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def test_bfloat16_is_the_product_in_bfloat16_then_fp32():
    hidden, weight, targets = problem(50)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    values, entropy = logprob.from_hidden(hidden, weight, targets, 1.0, VocabShard(0, VOCAB))
    logp = torch.log_softmax((hidden @ weight.t()).double(), -1)
    torch.testing.assert_close(values.double(), logp.gather(1, targets[:, None]).squeeze(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-5)


def test_equal_calls_give_equal_bits():
    hidden, weight, targets = problem(300, vocab=515)
    first, again = (with_gradients(logprob.from_hidden, hidden, weight, targets, 0.9, VocabShard(0, 515)) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("change,text", [
    (lambda h, w, t: (h[:, :3], w, t, 1.0), "don't match"),
    (lambda h, w, t: (h, w, t[:2], 1.0), "2 targets for 4"),
    (lambda h, w, t: (h, w, t, 0.0), "temperature"),
    (lambda h, w, t: (h, w, t, float("nan")), "temperature"),
])
def test_refuses(change, text):
    with pytest.raises(ValueError, match=text):
        logprob.from_hidden(*change(*problem(4)), VocabShard(0, VOCAB))


class Largest(TorchDispatchMode):
    """Remembers the shapes of all tensors that operations give."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.shapes.add(tuple(x.shape))
        return out


def test_logits_of_all_rows_never_exist():
    rows = 3 * logprob.CHUNK_TOKENS + 5
    hidden, weight, targets = problem(rows)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Largest() as seen:
        values, entropy = logprob.from_hidden(hidden, weight, targets, 0.7, VocabShard(0, VOCAB))
        (values.sum() + entropy.sum()).backward()
    assert (logprob.CHUNK_TOKENS, VOCAB) in seen.shapes, "the recorder sees the chunks"
    assert not [s for s in seen.shapes if rows in s and VOCAB in s]
    assert max(s[0] for s in seen.shapes if len(s) == 2 and s[1] == VOCAB) == logprob.CHUNK_TOKENS


def _over_shards(rank, world, init):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    found = []
    for rows, scale, temperature, vocab in CASES:
        hidden, weight, targets = problem(rows, scale, vocab=vocab)
        edge_targets(targets, vocab)
        each = -(-vocab // world)
        mine = torch.full((each, HIDDEN), 77.0)  # rows past the vocabulary hold garbage
        part = weight[rank * each : (rank + 1) * each]
        mine[: part.shape[0]] = part
        shard = VocabShard(rank * each, vocab, dist.group.WORLD)
        values, entropy, grad_hidden, grad_weight = with_gradients(
            logprob.from_hidden, hidden, mine, targets, temperature, shard)
        dist.all_reduce(grad_hidden)  # the caller's duty
        found.append((values, entropy, grad_hidden, grad_weight[: part.shape[0]]))
    dist.destroy_process_group()
    return found


CASES = [(40, 1.0, 1.0, VOCAB), (40, 1.0, 0.5, VOCAB), (1, 1.0, 1.0, VOCAB), (0, 1.0, 1.0, VOCAB), (7, 30.0, 1.0, 68),
         (3, 1.0, 1.0, 1)]


def edge_targets(targets: torch.Tensor, vocab: int) -> None:
    """The first and the last row of either shard of two."""
    edges = torch.tensor([0, vocab - 1, -(-vocab // 2) - 1, min(-(-vocab // 2), vocab - 1)])
    targets[: min(4, len(targets))] = edges[: len(targets)]


def test_vocabulary_over_two_ranks():
    """Values, entropy and gradients of two shards are one rank's; both ranks hold the same bits."""
    ranks = helpers.run_ranks(_over_shards, 2)
    for case, first, second in zip(CASES, *ranks, strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        rows, scale, temperature, vocab = case
        hidden, weight, targets = problem(rows, scale, vocab=vocab)
        edge_targets(targets, vocab)
        joined = (*first[:3], torch.cat([first[3], second[3]]))
        expected = with_gradients(logprob.from_hidden, hidden, weight, targets, temperature, VocabShard(0, vocab))
        for a, b in zip(joined, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_sum_of_squared_probabilities(monkeypatch):
    """Over chunks, with padding; the other outputs and gradients stay what they are without it."""
    hidden, weight, targets = problem(20)
    monkeypatch.setattr(logprob, "CHUNK_TOKENS", 7)
    padded = torch.cat([weight, torch.full((5, HIDDEN), 1e4)])
    found = []
    for squares in (False, True):
        h = hidden.clone().requires_grad_()
        values, entropy, *rest = logprob.from_hidden(h, padded, targets, 0.8, VocabShard(0, VOCAB), squares)
        (values.sum() + entropy.sum()).backward()
        found.append((values.detach(), entropy.detach(), h.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found)) and not rest[0].requires_grad
    want = torch.softmax(hidden.double() @ weight.double().t() / 0.8, dim=1).square().sum(dim=1)
    torch.testing.assert_close(rest[0].double(), want, rtol=1e-5, atol=1e-7)
