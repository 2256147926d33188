"""AdamW by Megatron's optimizer (fp32 masters, sharded over data-parallel ranks if asked) and its schedule."""

import math

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from hybridrl.config import Megatron, Optim
from hybridrl.megatron.config_from_hf import DTYPES


def optimizer_config(optim: Optim, megatron: Megatron) -> OptimizerConfig:
    """Megatron's OptimizerConfig from verl's keys."""
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        clip_grad=optim.clip_grad,
        bf16=megatron.dtype == "bfloat16",
        fp16=False,
        params_dtype=DTYPES[megatron.dtype],
        use_distributed_optimizer=megatron.use_distributed_optimizer,
    )


def schedule_settings(optim: Optim, total_steps: int) -> dict:
    """Arguments of OptimizerParamScheduler, in optimizer steps.

    Megatron's scheduler divides by the length of the decay: a warm-up as long as the run still leaves one step of it.
    """
    warmup = optim.lr_warmup_steps if optim.lr_warmup_steps >= 0 else int(optim.lr_warmup_steps_ratio * total_steps)
    return dict(
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=min(optim.min_lr, optim.lr),
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_steps, warmup + 1),
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        override_opt_param_scheduler=True,  # the run's own settings win over a checkpoint's
        use_checkpoint_opt_param_scheduler=False,
    )


class Optimizer:
    """One training step's end: check, clip, step. A non-finite gradient norm skips the step and is counted."""

    def __init__(self, model: list, optim: Optim, megatron: Megatron, total_steps: int):
        self.inner = get_megatron_optimizer(optimizer_config(optim, megatron), model)
        self.clip_grad = optim.clip_grad
        self.scheduler = OptimizerParamScheduler(self.inner, **schedule_settings(optim, total_steps))
        self.skipped = 0

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.inner.param_groups)

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> dict[str, float]:
        """Returns grad_norm (before clipping, global), lr (used by this step) and whether the step was skipped."""
        lr = self.lr
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if math.isfinite(norm):
            if self.clip_grad > 0:
                self._clip(norm)
            self.inner.step_with_ready_grads()
            self.scheduler.step(1)
        else:
            self.skipped += 1
        return {"grad_norm": norm, "lr": lr, "skipped_steps": float(self.skipped)}

    def _clip(self, norm: float) -> None:
        for part in getattr(self.inner, "chained_optimizers", [self.inner]):
            if not getattr(part, "is_stub_optimizer", False):
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=self.clip_grad, total_norm=norm)

    def state_dict(self) -> dict:
        """This rank's share: moments, fp32 masters, schedule."""
        state = {"scheduler": self.scheduler.state_dict(), "skipped": self.skipped, "parts": []}
        for part in getattr(self.inner, "chained_optimizers", [self.inner]):
            if getattr(part, "is_stub_optimizer", False):
                state["parts"].append(None)
            else:
                masters = [[p.data for p in group["params"]] for group in part.optimizer.param_groups]
                state["parts"].append({"torch": part.optimizer.state_dict(), "masters": masters})
        return state

    def load_state_dict(self, state: dict) -> None:
        """The reverse, on the same split. The model's own parameters are loaded separately, bit for bit.

        Learning rate, decay and betas stay the run's own: a resumed run may change them.
        """
        self.skipped = state["skipped"]
        for part, saved in zip(getattr(self.inner, "chained_optimizers", [self.inner]), state["parts"], strict=True):
            if saved is None:
                continue
            # The fused Adams count their steps in the groups.
            own = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in part.optimizer.param_groups]
            part.optimizer.load_state_dict(saved["torch"])
            for group, options in zip(part.optimizer.param_groups, own, strict=True):
                group.update(options)
            for group, masters in zip(part.optimizer.param_groups, saved["masters"], strict=True):
                for param, master in zip(group["params"], masters, strict=True):
                    param.data.copy_(master)
        self.scheduler.num_steps = 0  # its load_state_dict steps on from where it is
        self.scheduler.load_state_dict(state["scheduler"])
