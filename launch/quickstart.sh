#!/usr/bin/env bash
# The whole story on one machine, CPU or GPU:  launch/quickstart.sh [RUN_FOLDER]
# data and a small model -> supervised warm start -> PPO -> gate on held-out accuracy -> export -> evaluation -> report.
# Overrides for the PPO run go after the folder, e.g. actor_rollout_ref.actor.optim.lr=0 (then the gate must fail).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/quickstart}
[ $# -gt 0 ] && shift
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
export PYTHONWARNINGS=ignore
mkdir -p "$out"
say() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

ranks=2
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 1 ]; then ranks=1; fi

say "1/5 arithmetic problems and a small Qwen2 checkpoint"
rm -rf "$out/sft" "$out/ppo" "$out/eval" "$out/export"
python -m hybridrl.data.preprocess.arithmetic --local_dir "$out/data"
python -m hybridrl.data.tiny_model --out "$out/model" --data "$out/data/sft_train.parquet"

say "2/5 supervised warm start (Megatron, torchrun)"
torchrun --standalone --nproc_per_node "$ranks" -m hybridrl.trainer.main_sft --config-name recipes/quickstart_sft \
    data.train_files="$out/data/sft_train.parquet" model.path="$out/model" trainer.default_local_dir="$out/sft"
warm=$(ls -d "$out"/sft/global_step_*/huggingface)

say "3/5 PPO (Megatron actor and critic on $ranks ranks, vLLM, Ray)"
python -m hybridrl.trainer.main_ppo --config-name recipes/quickstart_ppo \
    data.train_files="$out/data/train.parquet" data.val_files="$out/data/test.parquet" \
    actor_rollout_ref.model.path="$warm" trainer.n_gpus_per_node="$ranks" \
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size="$ranks" trainer.default_local_dir="$out/ppo" "$@"
python -m hybridrl.telemetry.check "$out/ppo" --metric val-core/arithmetic/acc/mean@1 --min-final 0.7 --min-ratio 2

say "4/5 the exported actor: transformers loads it, main_eval scores it"
export=$(ls -d "$out"/ppo/global_step_*/actor/huggingface | sort -V | tail -1)
python - "$export" <<'PY'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
text = tokenizer.apply_chat_template([{"role": "user", "content": "What is 478 + 256?"}], add_generation_prompt=True,
                                     tokenize=False)
ids = tokenizer(text, return_tensors="pt")
answer = model.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids["input_ids"].shape[1]:]
print("transformers, What is 478 + 256?", tokenizer.decode(answer, skip_special_tokens=True))
PY
python -m hybridrl.trainer.main_eval actor_rollout_ref.model.path="$export" data.val_files="$out/data/test.parquet" \
    data.max_prompt_length=64 data.max_response_length=48 actor_rollout_ref.rollout.dtype=float32 \
    trainer.default_local_dir="$out/eval"

say "5/5 where to look"
cat <<END
  report       $out/ppo/report.html
  metrics      $out/ppo/metrics.jsonl
  TensorBoard  tensorboard --logdir $out/ppo/tensorboard
  rollouts     $out/ppo/rollouts/step_*.parquet
  samples      $out/ppo/validation/step_*.parquet
  the model    $export
END
