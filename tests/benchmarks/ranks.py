"""One rank of the measurement over several processes; started by `test_ranks.py`, prints what it has measured."""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path += [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "helpers"),
    str(Path(__file__).parents[2] / "examples"),
]

import torch
import torch.distributed as dist
from benchmarks import networks
from benchmarks.measure import forward_backward, rounds_and_passes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_drive import DRIVE
from lightning_drive.core.processes import ALONE, Ranks

ROUNDS = 6


def main(name: str, batch_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks.of(None, torch.device("cpu")) if dist.get_world_size() > 1 else ALONE
    torch.manual_seed(0)
    module = networks.NETWORKS[name]().train()
    plain = copy.deepcopy(module)
    torch.manual_seed(1 + ranks.index)
    batches = networks.batches(batch_size)
    wrapped = DistributedDataParallel(plain) if ranks.size > 1 else plain
    sent = count_payload()
    bare_pass = forward_backward(wrapped, lambda module: networks.loss(module, batches[0]))
    payload: list[int] = []
    rounds, passes, _ = rounds_and_passes(
        module,
        DRIVE(rounds=ROUNDS),
        lambda: (payload.append(sum(sent)), bare_pass()),
        batches=batches,
        loss_fn=networks.loss,
        ranks=ranks,
    )
    if dist.get_rank() == 0:
        gradients = sum(4 * parameter.numel() for parameter in plain.parameters())
        found = {
            "rounds": rounds,
            "passes": passes,
            "bytes_per_round": payload[-1] - payload[-2],
            "bytes_once": sum(sent) - payload[-1],
            "bytes_of_gradients": gradients,
        }
        print(json.dumps(found))
    dist.destroy_process_group()


def count_payload() -> list[int]:
    """Note the bytes that this process hands to every collective from now on; those of DDP's own go another way."""
    sent: list[int] = []
    all_reduce, all_gather, broadcast = dist.all_reduce, dist.all_gather, dist.broadcast_object_list

    def counted_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    def counted_all_gather(tensors: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return all_gather(tensors, tensor, *args, **kwargs)

    def counted_broadcast(values: list[Any], *args: Any, **kwargs: Any) -> Any:
        broadcast(values, *args, **kwargs)
        masks = values[0].get("masks", {}) if isinstance(values[0], dict) else {}
        sent.append(sum(packed["bits"].nbytes for packed in masks.values()))

    dist.all_reduce, dist.all_gather, dist.broadcast_object_list = (
        counted_all_reduce,
        counted_all_gather,
        counted_broadcast,
    )
    return sent


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    main(sys.argv[1], int(sys.argv[2]))
