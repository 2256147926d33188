"""One role's model on one rank: build from a Hugging Face folder, run forward and backward over packs, step, export.

The pipeline schedules are Megatron's own. Losses come in with global denominators, so gradients are summed, never
averaged: over micro-batches by accumulation, over data-parallel ranks by DDP with scaling 1.
Legend: T packed tokens, R response tokens, H hidden size.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from hybridrl.config import Megatron, Optim
from hybridrl.data.packed import PackedBatch
from hybridrl.megatron import config_from_hf, specs
from hybridrl.megatron.families import family_of, inverse_frequencies
from hybridrl.megatron.model import PolicyModel, ValueModel, full_hidden
from hybridrl.megatron.optimizer import Optimizer
from hybridrl.megatron.parallel import Coordinates
from hybridrl.ops import logprob
from hybridrl.weights import huggingface, layout


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made from. role: policy (log-probs) or value. optim None: forward only (the reference)."""

    role: str
    model_path: str
    megatron: Megatron
    optim: Optim | None
    total_steps: int = 1
    temperature: float = 1.0
    trust_remote_code: bool = False


# (this micro-batch's outputs of the head, the pack) -> (scalar loss or None, metrics whose sums mean something)
LossFunction = Callable[[dict[str, torch.Tensor], PackedBatch], tuple[torch.Tensor | None, dict[str, torch.Tensor]]]


class Engine:
    """The model of one role on this rank, with optimizer unless it is forward only."""

    def __init__(self, settings: EngineSettings, coords: Coordinates, device: torch.device):
        self.settings, self.coords, self.device = settings, coords, device
        self.hf_config = config_from_hf.read_hf_config(settings.model_path, settings.trust_remote_code)
        self.config = config_from_hf.transformer_config(self.hf_config, settings.megatron, device)
        self.dims = config_from_hf.layout_dims(self.hf_config, coords.tp)
        self.impl = specs.resolve_impl(settings.megatron.transformer_impl, device)
        self.first, self.last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
        self.virtual = self.config.virtual_pipeline_model_parallel_size
        # One chunk of consecutive layers, or with virtual stages several: chunk c of stage s comes after all chunks
        # c - 1. The last chunk of the last stage has the head.
        self.chunks = [self._build(chunk) for chunk in (range(self.virtual) if self.virtual else [None])]
        self.module = self.chunks[-1]
        self.load_hf(settings.model_path)
        self.model, self.optimizer = self.chunks, None
        if settings.optim is not None:
            self._wrap(settings.optim)
        else:
            for chunk in self.chunks:
                chunk.requires_grad_(False)

    def _build(self, chunk: int | None) -> torch.nn.Module:
        stages = self.config.pipeline_model_parallel_size * (self.virtual or 1)
        if self.config.num_layers % stages:
            virtual = f" x virtual_pipeline_model_parallel_size={self.virtual}" if self.virtual else ""
            raise ValueError(
                f"pipeline_model_parallel_size={self.config.pipeline_model_parallel_size}{virtual} does not divide the "
                f"model's {self.config.num_layers} layers"
            )
        model_class = ValueModel if self.settings.role == "value" else PolicyModel
        module = model_class(
            config=self.config,
            transformer_layer_spec=specs.block_spec(
                family_of(self.hf_config), self.impl, self.config.num_layers // stages
            ),
            vocab_size=self.dims.vocab_padded,
            max_sequence_length=self.hf_config.max_position_embeddings,
            pre_process=self.first and not chunk,
            post_process=self.last and chunk in (None, (self.virtual or 1) - 1),
            share_embeddings_and_output_weights=self.dims.tied,
            position_embedding_type="rope",
            vp_stage=chunk,
        )
        module = module.to(self.device)
        # Megatron knows the default frequencies and one setting of Llama 3.1's. These are transformers' own.
        module.rotary_pos_emb.inv_freq = inverse_frequencies(self.hf_config).to(self.device)
        module.layer_offset = get_transformer_layer_offset(self.config, vp_stage=chunk)
        for name, param in module.named_parameters():
            entry = layout.entry_of(name, module.layer_offset, self.dims)
            if entry is None:
                continue
            param.data = param.data.to(self.config.params_dtype)
            # Megatron marks split parameters only while it initialises them. Without the mark its gradient norm takes
            # every shard but the first for a duplicate.
            if entry.kind != "copy" and not getattr(param, "tensor_model_parallel", False):
                set_tensor_model_parallel_attributes(param, True, 1 if entry.kind == "row" else 0, 1)
        return module

    def _wrap(self, optim: Optim) -> None:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=self.settings.megatron.use_distributed_optimizer,
            overlap_grad_reduce=False,
        )
        # Without per-token loss Megatron's DDP would average over ranks.
        self.model = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(self.chunks)
        ]
        self.config.finalize_model_grads_func = _finalize_without_rescaling
        no_sync = [chunk.no_sync for chunk in self.model]
        self.config.no_sync_func = no_sync if self.virtual else no_sync[0]
        self.optimizer = Optimizer(self.model, optim, self.settings.megatron, self.settings.total_steps)

    # -- weights ---------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[str, torch.nn.Parameter, layout.Entry | None]]:
        """Every parameter of this rank (name within its chunk) with its place in a Hugging Face checkpoint."""
        for chunk in self.chunks:
            for name, param in chunk.named_parameters():
                yield name, param, layout.entry_of(name, chunk.layer_offset, self.dims)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Every parameter of this rank under a name of its own."""
        for i, chunk in enumerate(self.chunks):
            for name, param in chunk.named_parameters():
                yield (f"chunk{i}.{name}" if self.virtual else name), param

    @torch.no_grad()
    def load_hf(self, folder: str) -> None:
        """Loads this rank's slices of a Hugging Face folder. ValueError naming a missing, misshapen or extra tensor."""
        reader = huggingface.HfReader(folder)
        family = family_of(self.hf_config)
        layout.refuse_extra(
            reader,
            self.config.num_layers,
            family.qkv_bias,
            family.qk_norm,
            backbone=self.settings.role == "value",
            where=folder,
        )
        for name, param, entry in self.entries():
            if entry is None:
                continue
            value = layout.from_hf(entry, reader, self.dims, self.coords.tp, self.coords.tp_rank)
            if value.shape != param.shape:
                raise ValueError(
                    f"{folder}: {entry.hf_names} give {tuple(value.shape)}, {name} is {tuple(param.shape)}"
                )
            param.copy_(value)

    @torch.no_grad()
    def export_hf(self, folder: str, tokenizer: str | None = None) -> int:
        """Writes a Hugging Face folder; each pipeline stage one file. Collective over the model-parallel ranks of the
        first data-parallel replica; other ranks return at once. Returns the bytes this rank wrote.
        """
        if self.coords.dp_rank != 0:
            return 0
        tensors: dict[str, torch.Tensor] = {}
        group = mpu.get_tensor_model_parallel_group()
        for name, param, entry in self.entries():
            if entry is None or (name == "output_layer.weight" and self.dims.tied):
                continue
            if entry.kind == "copy":
                shards = [param.data]
            else:
                shards = [torch.empty_like(param.data) for _ in range(self.coords.tp)]
                dist.all_gather(shards, param.data.contiguous(), group=group)
            if self.coords.tp_rank == 0:
                full = layout.to_hf(entry, shards, self.dims)
                tensors.update({k: v.to("cpu", copy=True) for k, v in full.items()})
        sizes: dict[str, int] = {}
        if self.coords.tp_rank == 0:
            sizes = huggingface.write_shard(folder, tensors, self.coords.pp_rank, self.coords.pp)
            gathered = [None] * self.coords.pp if self.coords.pp_rank == 0 else None
            pp_group = mpu.get_pipeline_model_parallel_group()
            dist.gather_object(sizes, gathered, dst=dist.get_global_rank(pp_group, 0), group=pp_group)
            if self.coords.pp_rank == 0:
                huggingface.write_index(folder, gathered)
                huggingface.copy_side_files(self.settings.model_path, folder, self.settings.megatron.dtype, tokenizer)
        return sum(sizes.values())

    # -- compute ---------------------------------------------------------------------------------------------------

    def run(
        self, packs: list[PackedBatch], loss_fn: LossFunction, train: bool, squares: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """Forward (and with `train` backward) over micro-batches; returns loss_fn's metrics a micro-batch.

        The policy's head gives loss_fn `logprobs` and `entropy`, with `squares` also `sum_pi_squared`; all [R].

        The list is empty on all but the last pipeline stage. Gradients accumulate until `step`. Collective over the
        model-parallel group; with `train` also over data-parallel ranks at the end.
        """
        assert packs, "a rank without a sample would leave the others waiting"
        for chunk in self.model:
            chunk.train(train)
            if train:
                chunk.zero_grad_buffer()
        if train:
            self.optimizer.zero_grad()
        head = self._values if self.settings.role == "value" else functools.partial(self._logprobs, squares)

        # The interleaved schedule takes a multiple of the stages. One of `tp` tokens without a response costs next to
        # nothing, and a plan with too few samples to cut further has no other way.
        fill = -len(packs) % self.coords.pp if self.virtual else 0
        blank = _blank(self.coords.tp) if fill else None

        def forward_step(data: Iterator[PackedBatch], model):
            source = next(data)
            pack = source.to(self.device)
            hidden = model(pack.input_ids[None], pack.position_ids[None], None, packed_seq_params=_seq_params(pack))

            def loss(hidden: torch.Tensor, non_loss_data: bool = False):
                if source is blank:
                    return hidden.float().sum() * 0.0, torch.zeros([], dtype=torch.int), None
                value, metrics = loss_fn(head(hidden, pack), pack)
                if value is None:
                    value = hidden.new_zeros((), dtype=torch.float32)
                return value, torch.zeros([], dtype=torch.int), metrics

            return hidden, loss

        with torch.enable_grad() if train else torch.no_grad():
            packs = [*packs, *[blank] * fill]
            parts = get_forward_backward_func(self.coords.pp, self.virtual)(
                forward_step_func=forward_step,
                data_iterator=[iter(packs) for _ in self.model] if self.virtual else iter(packs),
                model=self.model,
                num_microbatches=len(packs),
                seq_length=1,  # unused: shapes travel with the tensors (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=not train,
            )
            return parts[: len(parts) - fill] if parts else parts

    def _logprobs(self, squares: bool, hidden: torch.Tensor, pack: PackedBatch) -> dict[str, torch.Tensor]:
        rows = full_hidden(hidden, self.config, grads_are_partial=True).index_select(0, pack.response_rows)
        weight = self.module.head_weight
        shard = logprob.VocabShard(
            self.coords.tp_rank * weight.shape[0], self.dims.vocab, mpu.get_tensor_model_parallel_group()
        )
        outputs = logprob.from_hidden(rows, weight, pack.targets, self.settings.temperature, shard, squares)
        return dict(zip(("logprobs", "entropy", "sum_pi_squared"), outputs, strict=False))

    def _values(self, hidden: torch.Tensor, pack: PackedBatch) -> dict[str, torch.Tensor]:
        rows = full_hidden(hidden, self.config, grads_are_partial=False).index_select(0, pack.response_rows)
        return {"values": self.module.value_head(rows)}

    def step(self) -> dict[str, float]:
        """Optimizer step over the gradients of the last `run(train=True)`: grad_norm, lr, skipped_steps."""
        return self.optimizer.step()

    def offload(self, to_host: bool) -> None:
        """Lets go of (or takes back) gradient buffers and optimizer state, as the config asks. On CUDA only: on the CPU
        there is one memory."""
        if self.optimizer is None or self.device.type == "cpu":
            return
        if self.settings.megatron.grad_offload:
            for chunk in self.model:
                chunk.offload_grad_buffers() if to_host else chunk.restore_grad_buffers()
        if self.settings.megatron.optimizer_offload:
            self.optimizer.inner.offload_to_cpu() if to_host else self.optimizer.inner.restore_from_cpu()
        torch.cuda.empty_cache()


def _finalize_without_rescaling(model, num_tokens=None, **kwargs) -> None:
    """Megatron's gradient reductions without its division by the number of tokens (denominators are in the loss)."""
    finalize_model_grads(model, None, **kwargs)


def _blank(tokens: int) -> PackedBatch:
    """A pack of one sequence without a response."""
    none, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    return PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        max_seqlen=tokens,
        response_rows=none,
        targets=none,
        response_mask=torch.zeros(0),
        cu_resp=zero,
        columns={},
    )


def _seq_params(pack: PackedBatch) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=pack.cu_seqlens,
        cu_seqlens_kv=pack.cu_seqlens,
        max_seqlen_q=pack.max_seqlen,
        max_seqlen_kv=pack.max_seqlen,
    )


def sum_metrics(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sums each scalar over micro-batches (they come divided by global denominators)."""
    return {k: functools.reduce(torch.add, (p[k] for p in parts)) for k in (parts[0] if parts else {})}
