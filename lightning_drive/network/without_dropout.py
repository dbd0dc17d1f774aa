"""Train or eval mode without Dropout: flags of layers, and dropout that is called as a function."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_drive.core import function_modes
from lightning_drive.core.arguments import Mode
from lightning_drive.core.function_modes import FunctionMode

_DROPOUTS = {
    *("dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_"),
    *("feature_alpha_dropout", "feature_alpha_dropout_", "dropout1d", "dropout2d", "dropout3d"),
}

_RECURRENT = {nn.LSTM, nn.GRU, nn.RNN}

_DROPOUT_ARGUMENTS = {
    "multi_head_attention_forward": (13, "training", False),
    "scaled_dot_product_attention": (4, "dropout_p", 0.0),
}
"""Function to the position, name and off value of the argument that controls its dropout."""


@contextmanager
def in_mode(module: nn.Module, mode: Mode) -> Generator[None]:
    """Set train or eval mode, without Dropout, and put every flag back; a training module keeps its frozen parts."""
    training = {submodule: submodule.training for submodule in module.modules()}
    dropout = {submodule: submodule.dropout for submodule in module.modules() if isinstance(submodule, nn.RNNBase)}
    try:
        if mode == "eval" or not module.training:
            module.train(mode == "train")
        for submodule in module.modules():
            if isinstance(submodule, _DropoutNd):
                submodule.training = False
        for recurrent in dropout:
            recurrent.dropout = 0.0
            if type(recurrent) in _RECURRENT:  # without dropout the flag changes nothing, but cuDNN needs it backwards
                recurrent.training = True
        yield
    finally:
        for submodule, flag in training.items():
            submodule.training = flag
        for recurrent, probability in dropout.items():
            recurrent.dropout = probability


class NoDropout(FunctionMode):
    """Turns off dropout that is called as a function, where no ``training`` flag of a Dropout layer reaches."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch without the dropout that is in it."""
        name = getattr(func, "__name__", "")
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name in _DROPOUT_ARGUMENTS:
            position, argument, off = _DROPOUT_ARGUMENTS[name]
            if len(args) > position:
                args = (*args[:position], off, *args[position + 1 :])
            else:
                kwargs = {**kwargs, argument: off}
        elif func in function_modes.BACKWARD:  # in which a checkpoint runs its part of the network again
            with function_modes.on_again(self):
                return function_modes.run_backward(func, args, kwargs)
        return func(*args, **kwargs)
