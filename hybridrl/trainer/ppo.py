"""The loop: draw prompts, generate, score, log-probs and values, advantages, update, publish weights, log.

Reads like the algorithm. Processes are in cluster_setup.py, cuts of the batch in batches.py, formulas in
hybridrl.algorithms, what each part is given in settings.py.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hybridrl.algorithms import kl
from hybridrl.config import Model
from hybridrl.data.balance import seq_cost
from hybridrl.data.prompts import PromptLoader
from hybridrl.data.trajectories import Trajectories, jagged
from hybridrl.megatron.config_from_hf import read_hf_config
from hybridrl.megatron.families import head_dim
from hybridrl.resolution import Resolved
from hybridrl.rewards.manager import RewardManager
from hybridrl.telemetry import metrics as tm
from hybridrl.telemetry.phases import PhaseTimer, memory_metrics
from hybridrl.telemetry.trackers import Trackers
from hybridrl.trainer import checkpoints, debug, settings, signals
from hybridrl.trainer.batches import StepBatches
from hybridrl.trainer.cluster_setup import Parts
from hybridrl.trainer.generation import Generation
from hybridrl.trainer.validation import Validator


class PPOTrainer:
    """Runs `fit` on parts that are up. `validator` is None when there are no validation prompts."""

    def __init__(
        self,
        resolved: Resolved,
        total_steps: int,
        parts: Parts,
        loader: PromptLoader,
        tokenizer,
        rewards: RewardManager,
        trackers: Trackers,
        validator: Validator | None,
    ):
        self.resolved, self.config, self.total_steps, self.parts = resolved, resolved.config, total_steps, parts
        self.loader, self.tokenizer, self.rewards = loader, tokenizer, rewards
        self.trackers, self.validator = trackers, validator
        self.timer = PhaseTimer(trackers.on_phase)
        self.passes = settings.passes(resolved)
        self.actor_loss = settings.actor_loss(resolved)
        self.critic_loss = settings.critic_loss(resolved) if resolved.critic else None
        self.old_logprobs = settings.old_logprobs(resolved)
        generation = settings.generation(resolved, stop_ids(tokenizer))
        self.generation = Generation(generation, loader, parts.fleet, tokenizer, rewards, self.timer)
        self.kl_in_reward = settings.kl_in_reward(resolved)
        self.kl_ctrl = kl.make_kl_controller(**self.kl_in_reward["controller"]) if self.kl_in_reward else None
        self.cost = cost_model(self.config.actor_rollout_ref.model)
        self.recorded = settings.recorded(resolved)
        self.step = 0

    # -- the loop --------------------------------------------------------------------------------------------------

    def fit(self, resume_from: Path | None = None) -> None:
        """Trains to the last step. Validation before the first step carries that step's number."""
        trainer = self.config.trainer
        if trainer.debug == "rollout":
            return self._only_rollouts()
        if resume_from:
            self._resume(resume_from)
        sync = self._publish()
        if self.validator and (trainer.val_before_train or trainer.val_only) and not resume_from:
            self.trackers.log({**self._validate(), **sync}, self.step)
        if trainer.val_only:
            return
        while self.step < self.total_steps:
            self.step += 1
            self.trackers.log(self._train_step(), self.step)

    def _only_rollouts(self) -> None:
        """trainer.debug=rollout: generates with the weights of model.path, scores and writes the tables."""
        data = self.config.data
        while self.step < self.total_steps:
            self.step += 1
            with self.timer("step"):
                batch, found = self._rollout()
            self._dump(batch)
            seconds = self.timer.drain()
            tokens = [int(batch.lengths(name).sum()) for name in ("prompt_ids", "response_ids")]
            found |= tm.data_metrics(batch, data.max_prompt_length, data.max_response_length)
            self.trackers.log(found | tm.timing_metrics(seconds, *tokens), self.step)

    def _train_step(self) -> dict[str, float]:
        restarts = self.parts.fleet.restarts if self.parts.fleet else 0
        with self.timer("step"):
            batch, found = self._rollout()
            work = StepBatches(
                batch,
                self.parts.groups,
                self.config.actor_rollout_ref.rollout.n,
                self.step,
                self.cost,
                self.config.trainer.balance_batch,
                self.actor_loss.loss_scale_factor,
            )
            self._trainer_on()
            self._forward_passes(work)
            with self.timer("adv"):
                found |= self._signals(work)
            found |= self._updates(work)
            found |= self._memory()
            work.release()
            if due(self.config.trainer.save_freq, self.step, self.total_steps):
                with self.timer("save_checkpoint"):  # now, while the trainer has its whole state on the device
                    self._save()
            found |= self._publish()
            if self.validator and due(self.config.trainer.test_freq, self.step, self.total_steps):
                found |= self._validate()
        if not self.recorded:
            found["rollout/replica_restarts"] = self.parts.fleet.restarts - restarts
            self._dump(work.batch)
        return found | self._step_metrics(work)

    def _rollout(self) -> tuple[Trajectories, dict[str, float]]:
        """Prompts, responses and scores of this step."""
        where = {"training/global_step": self.step}
        if not self.recorded:
            batch, found = self.generation.step(self.step)
            return batch, found | where
        trainer = self.config.trainer
        with self.timer("gen"):
            _, where["training/epoch"] = self.loader.next()  # the position in the data goes on
            batch = debug.read(trainer.rollout_data_dir, self.step, scored=trainer.debug == "train")
        if trainer.debug == "train":
            return batch, where
        batch, found = self.generation.scored(batch)
        return batch, found | where

    def _trainer_on(self) -> None:
        """GENERATE -> TRAIN: the rollout engine lets go of the GPU, the trainer takes its state back."""
        if settings.sleeps(self.resolved) and not self.recorded:
            self.parts.fleet.sleep()
        for group in self.parts.groups.values():
            group.offload(False)

    def _forward_passes(self, work: StepBatches) -> None:
        """Old log-probs (from where settings.old_logprobs says), reference, values."""
        if self.old_logprobs == "rollout":
            work.batch = work.batch.with_columns(old_logprobs=work.batch.table["rollout_logprobs"])
        elif self.old_logprobs == "pass":
            with self.timer("old_log_prob"):
                work.compute(self.passes["old"], settings.old_outputs(self.resolved))
        if self.resolved.ref:
            with self.timer("ref"):
                work.compute(self.passes["ref"], {"ref_logprobs": "logprobs"})
        if self.resolved.critic:
            with self.timer("values"):
                work.compute(self.passes["critic"], {"values": "values"})

    def _signals(self, work: StepBatches) -> dict[str, float]:
        """Rollout correction, advantages and returns, and what else the loss reads, added to the batch."""
        found = {}
        corrected = settings.correction(self.resolved)
        if corrected and self.old_logprobs != "rollout":
            found |= signals.correct_rollouts(work, corrected)
        found |= signals.estimate(work, settings.advantages(self.resolved), self.kl_in_reward, self.kl_ctrl)
        if selection := settings.selection(self.resolved):
            signals.select_tokens(work, selection)
        return found

    def _updates(self, work: StepBatches) -> dict[str, float]:
        found = {}
        if self.resolved.critic:
            with self.timer("update_critic"):
                stats, _ = work.update(self.passes["critic"], self.critic_loss, ["values", "returns"])
                found |= {k if "/" in k else f"critic/{k}": v for k, v in stats.items()}
        if self.step > self.config.trainer.critic_warmup:
            with self.timer("update_actor"):
                columns = ["advantages", *self.actor_loss.columns]
                columns += ["old_logprobs"] if "old_logprobs" in work.batch else []
                columns += ["ref_logprobs"] if self.actor_loss.use_kl_loss else []
                stats, own = work.update(self.passes["actor"], self.actor_loss, columns)
                found |= {k if "/" in k else f"actor/{k}": v for k, v in stats.items()}
            one_step = self.resolved.batch.actor_optimizer_steps == 1
            if self.old_logprobs == "update" or (self.old_logprobs == "rollout" and one_step):
                # The update's own forward is the old policy's, and what the rollout's log-probs are compared with.
                work.batch = work.batch.with_columns(old_logprobs=jagged(own, work.offsets))
        if self.actor_loss.use_kl_loss:
            found["actor/kl_coef"] = self.actor_loss.kl_loss_coef
        return found

    def _publish(self) -> dict[str, float]:
        """TRAIN -> PUBLISH -> GENERATE: the actor's weights into the rollout engine, by way of a Hugging Face folder
        and vLLM's own loader (the golden path)."""
        if self.recorded:
            return {}
        fleet, sleeping = self.parts.fleet, settings.sleeps(self.resolved)
        with self.timer("update_weights"):
            folder = os.path.join(self.parts.publish_dir, "actor")
            shutil.rmtree(folder, ignore_errors=True)  # the last version: kept till now for a replica that is replaced
            os.makedirs(folder)
            written = self.parts.groups["actor"].export_hf("actor", folder)
            for group in self.parts.groups.values():
                group.offload(True)
            if sleeping:
                fleet.wake_weights()
            loaded = fleet.update_weights(folder, self.step)
            if sleeping:
                fleet.wake_kv()
        seconds = max(w["seconds"] for w in written) + loaded["seconds"]
        size = sum(w["bytes"] for w in written)
        return {
            "weight_sync/path": 0.0,  # 0: golden path
            "weight_sync/export_s": max(w["seconds"] for w in written),
            "weight_sync/load_s": loaded["seconds"],
            "weight_sync/gb_per_s": size / 1e9 / max(seconds, 1e-9),
        }

    def _validate(self) -> dict[str, float]:
        with self.timer("testing"):
            found, samples = self.validator.run(self.parts.fleet, self.step)
        self.trackers.log_samples(samples, self.step, self.config.trainer.log_val_generations)
        return found

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        contents = self.config.actor_rollout_ref.actor.checkpoint.save_contents

        def write(folder: str) -> None:
            for group in self.parts.groups.values():
                group.save(folder)
            if "hf_model" in contents:
                target = os.path.join(folder, "actor", "huggingface")
                os.makedirs(target)
                self.parts.groups["actor"].export_hf(
                    "actor", target, self.config.actor_rollout_ref.model.tokenizer_path
                )

        state = {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "kl_ctrl": self.kl_ctrl.state_dict() if self.kl_ctrl else None,
        }
        trainer = self.config.trainer
        checkpoints.save(trainer.default_local_dir, self.step, write, state, trainer.max_actor_ckpt_to_keep)

    def _resume(self, folder: Path) -> None:
        state = checkpoints.read_state(folder)
        self.loader.load_state_dict(state["loader"])
        if self.kl_ctrl and state["kl_ctrl"]:
            self.kl_ctrl.load_state_dict(state["kl_ctrl"])
        for group in self.parts.groups.values():
            group.load(str(folder))
        self.step = state["step"]

    # -- numbers ---------------------------------------------------------------------------------------------------

    def _dump(self, batch: Trajectories) -> None:
        folder = Path(self.config.trainer.rollout_data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        batch.write(folder / f"step_{self.step}.parquet")

    def _memory(self) -> dict[str, float]:
        """The largest rank's memory under actor/perf (colocated roles included), the driver's and the whole
        machine's."""
        ranks = self.parts.groups["actor"].memory()
        largest = {k: max(r[k] for r in ranks) for k in ranks[0] if k != "perf/cpu_memory_used_gb"}
        return {**{f"actor/{k}": v for k, v in largest.items()}, **memory_metrics()}

    def _step_metrics(self, work: StepBatches) -> dict[str, float]:
        batch, data = work.batch, self.config.data
        seconds = self.timer.drain()
        prompt_tokens = int(batch.lengths("prompt_ids").sum())
        response_tokens = int(batch.lengths("response_ids").sum())
        # None in critic_warmup when the actor had no pass of its own.
        shares = work.shares.get(("actor", self.passes["actor"].share_name))
        found = tm.data_metrics(batch, data.max_prompt_length, data.max_response_length)
        found |= tm.timing_metrics(seconds, prompt_tokens, response_tokens)
        step_seconds = sum(
            s for k, s in seconds.items() if "/" not in k and k not in ("step", "testing", "save_checkpoint")
        )
        found |= tm.throughput_metrics(prompt_tokens + response_tokens, step_seconds, self.resolved.actor.ranks)
        if shares:
            found |= tm.seqlen_metrics(work.lengths, [share.rows for share in shares])
        # In bypass mode with several optimizer steps nothing is known of the trainer's policy before the update.
        comparable = self.old_logprobs != "rollout" or self.resolved.batch.actor_optimizer_steps == 1
        if self.config.actor_rollout_ref.rollout.log_ppl_check and "old_logprobs" in batch and comparable:
            found |= tm.rollout_mismatch_metrics(
                batch.flat("old_logprobs")[0],
                batch.flat("rollout_logprobs")[0],
                batch.flat("response_mask")[0],
                work.offsets,
            )
        return found


def due(frequency: int, step: int, last: int) -> bool:
    """Whether something done every `frequency` steps (-1: never) and at the last one is done at `step`."""
    return frequency > 0 and (step == last or step % frequency == 0)


def stop_ids(tokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def cost_model(model: Model) -> Callable[[np.ndarray], np.ndarray]:
    """Work of a sequence by its length, from the model's own sizes."""
    hf = read_hf_config(model.path, model.trust_remote_code)
    return lambda lengths: seq_cost(
        lengths,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        ffn_hidden_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim(hf),
        vocab_size=hf.vocab_size,
    )
