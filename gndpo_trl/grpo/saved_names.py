"""The names that weights are saved under, which are not always those that a model has for them."""

import torch
from accelerate.utils import is_peft_model


class SavedNamesMixin:
    """
    Has a [`~trl.GRPOTrainer`] load all weights of a checkpoint, when a run goes on and for `load_best_model_at_end`.

    transformers saves the weights of many image-text models under other names than theirs, those of the published
    checkpoints, and loads by name what it finds when a run goes on: none of them, with a warning.
    """

    _has_other_names = False  # the checkpoint that is being loaded

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        keep_checkpoint_names(self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_other_names(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_other_names(self.state.best_model_checkpoint, self.model)

    def _issue_warnings_after_load(self, load_result):
        self._has_other_names = bool(load_result.unexpected_keys)
        if not self._has_other_names:
            super()._issue_warnings_after_load(load_result)

    def _load_other_names(self, folder: str, model: torch.nn.Module) -> None:
        if self._has_other_names:
            self._has_other_names = False
            saved = type(model).from_pretrained(folder, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())


def keep_checkpoint_names(model: torch.nn.Module) -> None:
    """
    Make a model save its weights under the names that they were loaded from.

    Under ZeRO-3, transformers 5.23 remembers all renamings of weights that it might have needed to load a model, and
    undoes them when it saves: the text weights of image-text checkpoints then get names that only it can read.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    if getattr(model, "_weight_conversions", None) is not None:
        model._weight_conversions = [change for change in model._weight_conversions if change.was_used()]
