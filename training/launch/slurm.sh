#!/bin/bash
# sbatch slurm.sh OUTPUT_DIR RECIPE [--field value ...]             one machine with four GPUs
# sbatch --nodes 2 --gpus-per-node 8 slurm.sh OUTPUT_DIR RECIPE ... two with eight each
# Submitted again, or requeued, it goes on from the newest checkpoint of OUTPUT_DIR, which all machines must see.
#SBATCH --job-name=kcfi
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # seconds for a step and a checkpoint behind SIGTERM; torchrun's own are 30
output=$1
shift
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=
if compgen -G "$output/checkpoint-*/complete.json" >/dev/null; then resume=--resume; fi
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" \
  -m kcfi_cli train "$@" --output_dir "$output" $resume
