"""The agreement of ranks on masks: all of them get those of the first, and those that found others are named."""

import torch

from lightning_drive.core.messages import listed
from lightning_drive.core.processes import Ranks
from lightning_drive.network.masks import Masks


def agreed(masks: Masks, ranks: Ranks) -> tuple[Masks, str]:
    """Return the masks of the first rank, on the devices of this one's, and a warning if any rank found others."""
    if ranks.size == 1:
        return masks, ""
    first = Masks.from_state_dict(ranks.broadcast(masks.state_dict() if ranks.index == 0 else {}))
    first = Masks({name: mask.to(masks[name].device) for name, mask in first.items()})
    differ = ranks.gather(torch.tensor(first.digest() != masks.digest())).nonzero().flatten().tolist()
    if not differ:
        return first, ""
    return first, (
        f"Rank {listed(differ)} found other masks than rank 0, whose masks all ranks have now: the weights differ"
        " between ranks. Something changes them on one rank only, such as a random initialisation after `setup`."
    )
