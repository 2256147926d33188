"""PackedBatch: sequences end to end in flat tensors, with the rows that predict response tokens picked out.

T packed tokens, N sequences, R response tokens. Attention kernels take `cu_seqlens`; losses and advantages live on the
R response tokens alone, jagged by `cu_resp`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from hybridrl.data.trajectories import Trajectories


@dataclass
class PackedBatch:
    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: torch.Tensor  # [N+1] int32, or [N+2] when padding made a dummy sequence at the end
    max_seqlen: int  # longest sequence, the dummy included
    response_rows: torch.Tensor  # [R] int64, index into T of the token before each response token: it predicts it
    targets: torch.Tensor  # [R] int64, the response tokens
    response_mask: torch.Tensor  # [R] float32, 1 = trained on
    cu_resp: torch.Tensor  # [N+1] int32
    columns: dict[str, torch.Tensor] = field(default_factory=dict)  # each [R] float32

    @property
    def num_sequences(self) -> int:
        """N, without the dummy."""
        return len(self.cu_resp) - 1

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)
                 if isinstance(getattr(self, f.name), torch.Tensor)}
        return replace(self, **moved, columns={name: x.to(device) for name, x in self.columns.items()})


def pack(trajectories: Trajectories, columns: Sequence[str] = (), pad_multiple: int = 1,
         pad_token_id: int = 0) -> PackedBatch:
    """Pack rows in order, prompt then response. `columns` are per-response-token columns to carry along as float32.

    When T is no multiple of `pad_multiple` (sequence parallelism needs one of TP), pad tokens form a dummy sequence:
    nothing attends across it and no response row lies in it. A missing `response_mask` column means all ones.
    An empty response has no rows. ValueError for an empty prompt: its first response token would have no predictor.
    """
    prompts, prompt_offsets = trajectories.flat("prompt_ids")
    responses, response_offsets = trajectories.flat("response_ids")
    prompt_lens, response_lens = np.diff(prompt_offsets), np.diff(response_offsets)
    if (prompt_lens == 0).any():
        raise ValueError(f"row {int(np.argmin(prompt_lens))} has an empty prompt: each needs at least one token")
    lens = prompt_lens + response_lens
    starts = np.concatenate([[0], np.cumsum(lens)])
    total = int(starts[-1])
    pad = -total % pad_multiple

    # Place in T of each prompt and response token: its sequence's start plus its place in the sequence.
    prompt_places = np.arange(len(prompts)) + np.repeat(starts[:-1] - prompt_offsets[:-1], prompt_lens)
    places = np.arange(len(responses)) + np.repeat(starts[:-1] + prompt_lens - response_offsets[:-1], response_lens)
    input_ids = np.full(total + pad, pad_token_id, np.int64)
    input_ids[prompt_places] = prompts
    input_ids[places] = responses
    position_ids = np.arange(total + pad)
    position_ids[:total] -= np.repeat(starts[:-1], lens)
    position_ids[total:] -= total
    cu_seqlens = np.append(starts, total + pad) if pad else starts
    mask = _column(trajectories, "response_mask", response_offsets) if "response_mask" in trajectories else \
        torch.ones(len(responses))
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(max(lens.max(initial=0), pad)),
        response_rows=torch.from_numpy(places - 1),
        targets=torch.from_numpy(responses.astype(np.int64)),
        response_mask=mask,
        cu_resp=torch.from_numpy(response_offsets.astype(np.int32)),
        columns={name: _column(trajectories, name, response_offsets) for name in columns},
    )


def _column(trajectories: Trajectories, name: str, response_offsets: np.ndarray) -> torch.Tensor:
    values, offsets = trajectories.flat(name)
    assert np.array_equal(offsets, response_offsets), f"column {name!r} is not one value a response token"
    return torch.from_numpy(values.astype(np.float32))  # astype copies: Arrow's memory is read-only
