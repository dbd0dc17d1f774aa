"""Check that synaptic flow is defined for a network."""

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_drive.core.messages import listed, shown_error
from lightning_drive.network import synflow_breakers
from lightning_drive.network.forward_passes import ForwardPass


def warnings(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], forward_pass: ForwardPass, remedy: str
) -> Iterator[str]:
    """Warn of layers that synaptic flow is not defined for; raise ``ValueError`` if they are a large part.

    ``remedy`` says how to provide the input of the network, where ``forward_pass`` does not run.
    """
    try:
        layers = synflow_breakers.flow_breakers(module, forward_pass)
    except Exception as error:  # from the module's own `forward`, which may not be made for this call
        reason = f"{shown_error(error)}. {remedy}"
        raise ValueError(f"SynFlow could not run the network on {forward_pass.source}: {reason}") from error
    named = listed([layer.layer for layer in layers], most=3)
    text = (
        f"SynFlow is not defined for {named}: saturating activations stop the flow and normalisation mixes its signs."
    )
    without = {id(weight) for layer in layers for weight in layer.weights}
    sizes = {id(parameter): parameter.numel() for parameter in parameters.values()}
    share = sum(size for key, size in sizes.items() if key in without) / sum(sizes.values())
    if share > 1 / 3 or len(layers) * 3 > len(parameters):
        raise ValueError(f"{text} That is too much of this network; use another method, such as DRIVE.")
    if layers:
        yield f"{text} Their neighbours' scores mean little."
