#!/bin/bash
# Compress DeiT-S on four nodes of eight GPUs, for as many jobs as it takes: sbatch examples/slurm.sh
#
# Five minutes before its time is over a job gets SIGUSR1, saves its state and ends; it is queued again and goes on.
# A job that a node fails takes up the last state too, which is ten minutes old at most (--save-minutes).
#SBATCH --job-name=spvit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=spvit-%j.log

run=${RUN:-runs/deit_small_3.3g}  # on a disk that all nodes see, as the images are
data=${DATA:-imagenet}

# 32 GPUs with 32 images each make the published batch of 1,024.
words=(compress --recipe recipes/deit_small_3.3g.yaml --data "$data" --output "$run"
    --images.batch-size 32 --images.workers 10 --precision bf16)
if [ -f "$run/config.yaml" ]; then
    words=(compress --output "$run" --resume)
fi

# srun starts the processes itself, without torchrun between them, so that each gets the signal.
export WORLD_SIZE=$SLURM_NTASKS MASTER_PORT=29500
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m spvit_command "$@"' spvit "${words[@]}"
code=$?

if [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; then  # stopped by SIGUSR1, here or in another process
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
