#!/usr/bin/env bash
# The whole story on a tiny help desk: data, SFT, reward model, PPO, report.
set -euo pipefail
seed=${SEED:-0}
config=examples/support_replies
export PYTHONWARNINGS=ignore

python -m examples.support_replies.generate --seed "$seed"
echo "== 1/3  supervised fine-tuning on good and bad replies"
raylign sft $config/sft.yaml --in-process --overwrite seed="$seed"
echo "== 2/3  reward model from noisy preferences"
raylign reward-model $config/reward_model.yaml --overwrite seed="$seed"
echo "== 3/3  PPO: Ray actors, vLLM generators, FSDP learner"
raylign train $config/ppo.yaml --overwrite seed="$seed"
raylign audit support-ppo
