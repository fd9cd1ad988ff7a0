"""What of a student is trained."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from trl import GRPOConfig


def check_trains(model: torch.nn.Module) -> None:
    """Raise `ValueError` if a student has nothing to train: an optimizer step would change nothing that it computes."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not is_peft_model(model):
        if not trained:
            raise ValueError(
                "`model` has nothing to train: all of its parameters are frozen (`requires_grad` is False). Call "
                "`model.requires_grad_(True)`, or pass a `peft_config`."
            )
        return
    resting = model.peft_config.keys() - {*model.active_adapters}
    if all(resting & {*name.split(".")} for name in trained):
        raise ValueError(
            f"`model` has nothing to train: its adapter ({', '.join(model.active_adapters)}) was loaded for inference. Load it "
            "with `PeftModel.from_pretrained(..., is_trainable=True)`, or, where the configuration says "
            "`inference_mode=True`, set that to False."
        )


def check_adapter(args: GRPOConfig, model: Any) -> None:
    """Raise `ValueError` if TRL cannot make its reference model, a copy of the adapter of a model."""
    if args.beta == 0.0 or not isinstance(model, PeftModel):
        return
    if "default" not in model.peft_config:
        raise ValueError(
            f"`beta` is {args.beta}, and TRL makes the reference model of the adapter named 'default', but those of `model` "
            f"are named {', '.join(map(repr, model.peft_config))}. Load the adapter under that name (`adapter_name`), or "
            "set `beta` to 0."
        )
    bias = getattr(model.peft_config["default"], "bias", "none")
    if bias != "none":
        raise ValueError(
            f"`beta` is {args.beta}, for which TRL makes a reference model of a copy of the adapter, but peft holds one "
            f"adapter alone where biases are trained (`bias` is {bias!r}). Set `beta` to 0, or `bias` to 'none'."
        )
