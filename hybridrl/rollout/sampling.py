"""How responses are drawn: the settings of a batch, and the seed of each request."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Sampling of one batch. Log-probs that come back belong to the distribution after temperature, top_p and top_k.

    seed: requests draw their own seeds from it (`request_seed`). None: vLLM's global generator, not reproducible.
    stop_token_ids: end the response, besides the end-of-sequence ids in the model's generation config.
    ignore_eos: neither of the two ends a response; each has exactly max_tokens tokens.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int | None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"rollout.temperature={self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p={self.top_p}: must be in (0, 1]; 1 turns it off")
        if self.top_k < -1:
            raise ValueError(f"rollout.top_k={self.top_k}: must be positive, or -1 or 0 to turn it off")
        if self.max_tokens < 1:
            raise ValueError(f"data.max_response_length={self.max_tokens}: must be at least 1")

    def vllm_params(self, uid: str, sample: int, step: int):
        """vLLM's SamplingParams of one request. Only the final output comes back, as token ids with their log-probs."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            seed=None if self.seed is None else request_seed(self.seed, uid, sample, step),
            ignore_eos=self.ignore_eos,
            # vLLM's ignore_eos leaves explicit stop ids in force.
            stop_token_ids=[] if self.ignore_eos else list(self.stop_token_ids),
            logprobs=0,  # the drawn token's own log-prob and no alternatives
            flat_logprobs=True,  # plain lists: a dictionary a token costs more than the rest of the request's handling
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def request_seed(seed: int, uid: str, sample: int, step: int) -> int:
    """A request's seed in [0, 2**63), the same in every process and Python version, whatever the rest of the batch."""
    digest = hashlib.blake2b(f"{seed}/{step}/{sample}/{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
