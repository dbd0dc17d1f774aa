#!/usr/bin/env bash
# All measurements of this page, in the current folder: `bash reproduce.sh DIR`, with the images in DIR/train and DIR/test.
# Runs that are done already are not done again; `speedup.py` and `collapse.py` add to what is there.
set -euo pipefail
paper=$(cd "$(dirname "$0")/.." && pwd)
data=(--data=ImageTree --data.root="$1" --data.name='CIFAR-10 (JPEG)')
run=(python "$paper/run.py" --experiments convnet_cifar10 --jobs 2 --results convnet_cifar10.jsonl)
speedup=(python "$paper/speedup.py" --results speedup.jsonl)
collapse=(python "$paper/collapse.py" --experiments vgg16_cifar10 --results collapse.jsonl)

"${run[@]}" --methods dense magnitude snip synflow drive imp -- "${data[@]}"
"${run[@]}" --methods snip synflow drive imp --controls shuffle reinit --sparsities 0.98 -- "${data[@]}"
"${run[@]}" --methods iterative_snip warmup_snip --sparsities 0.98 0.993 -- "${data[@]}"
"${run[@]}" --methods drive_long --sparsities 0.98 0.993 -- "${data[@]}" --model.lr_scheduler.T_max=35

gradual=(gradual gradual_exponential gradual_drive gradual_drive_exponential)
"${run[@]}" --methods "${gradual[@]}" --sparsities 0.98 0.993 -- "${data[@]}"
"${run[@]}" --methods gradual_exponential_half gradual_exponential_late --sparsities 0.98 0.993 -- "${data[@]}"
"${run[@]}" --methods gradual_exponential --sparsities 0.9 0.95 -- "${data[@]}"
"${run[@]}" --methods gradual_exponential_long -- "${data[@]}" --model.lr_scheduler.T_max=35
"${run[@]}" --methods gradual_long --sparsities 0.98 0.993 -- "${data[@]}" --model.lr_scheduler.T_max=35
full=(python "$paper/run.py" --experiments convnet_cifar10_full --jobs 2 --results convnet_cifar10_full.jsonl)
"${full[@]}" --methods dense synflow drive gradual imp --sparsities 0.98 -- "${data[@]}"

"${speedup[@]}" --experiments alexnet_cifar10 --steps 10 --rounds 100
"${speedup[@]}" --experiments vgg16_cifar10 resnet18_cifar10 vgg16_cifar100 resnet18_cifar100 --steps 6 --rounds 10
"${speedup[@]}" --experiments vgg16_tinyimagenet resnet18_tinyimagenet resnet18_imagenet32 --steps 4 --rounds 5

few=(SNIP 'SNIP, BatchNorm by running statistics' SynFlow Magnitude)
"${collapse[@]}" --methods "${few[@]}" -- "${data[@]}"
"${collapse[@]}" --methods 'iterative SNIP, 20 rounds' --sparsities 0.993 -- "${data[@]}"
