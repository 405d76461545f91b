#!/usr/bin/env bash
# A verifiable reward: the policy knows how to add without carrying, PPO teaches it to carry.
set -euo pipefail
seed=${SEED:-0}
config=examples/arithmetic
export PYTHONWARNINGS=ignore

python -m examples.arithmetic.generate --seed "$seed"
raylign sft $config/sft.yaml --in-process --overwrite seed="$seed"
raylign train $config/ppo.yaml --overwrite seed="$seed"
raylign train $config/grpo.yaml --overwrite seed="$seed"
