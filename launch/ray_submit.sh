#!/usr/bin/env bash
# Hands a PPO run to a Ray cluster as a job and returns at once:
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 launch/ray_submit.sh data.train_files=... actor_rollout_ref.model.path=...
# The job's driver runs on the cluster's head, in a copy of this checkout: give data, models and
# trainer.default_local_dir as absolute paths that every node sees. `ray job list|status|logs|stop` follow the job.
#   RAY_API_SERVER_ADDRESS  the dashboard (default http://127.0.0.1:8265)
#   PYTHON                  the cluster's interpreter (default python, as the shell of `ray start` found it)
#   SUBMISSION_ID           a name for the job (default: Ray's own)
#   NCCL_IB_*, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   travel to every process of the job when they are set
set -euo pipefail
cd "$(dirname "$0")/.."
id=()
[ -z "${SUBMISSION_ID:-}" ] || id=(--submission-id "$SUBMISSION_ID")
# Ray leaves out what .gitignore names, and the built csrc (hybridrl/_C*.so) is there: the copy would lack it.
# runtime_env.yaml says what travels instead.
export RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1
runtime_env=$(mktemp --suffix .yaml)
trap 'rm -f "$runtime_env"' EXIT
cp launch/runtime_env.yaml "$runtime_env"
for name in $(compgen -e | grep -E '^(NCCL_IB_[A-Z0-9_]+|NCCL_SOCKET_IFNAME|GLOO_SOCKET_IFNAME)$' || true); do
    printf "  %s: '%s'\n" "$name" "${!name//\'/\'\'}" >>"$runtime_env"  # env_vars is the file's last block
done
ray job submit --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" "${id[@]}" \
    --runtime-env "$runtime_env" --no-wait -- "${PYTHON:-python}" -m hybridrl.trainer.main_ppo "$@"
