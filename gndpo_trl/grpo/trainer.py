"""`GRPOTrainer` with everything that this folder adds to it."""

import inspect

from datasets import IterableDataset
from trl import GRPOTrainer

from .checkpoints import CheckpointMixin
from .completion_tables import CompletionTablesMixin
from .data_checks import check_datasets, check_images_alike, check_images_are_read
from .evaluation_logs import EvaluationLogsMixin, check_best_metric
from .finite_steps import FiniteStepsMixin
from .learned_prompts import check_learned_prompts
from .real_tokens import RealTokensMixin
from .sampling import SamplingMixin
from .step_progress import StepProgressMixin
from .vllm import VLLMMixin


class ExtendedGRPOTrainer(
    SamplingMixin,
    StepProgressMixin,
    RealTokensMixin,
    VLLMMixin,
    FiniteStepsMixin,
    CompletionTablesMixin,
    CheckpointMixin,
    GRPOTrainer,
    EvaluationLogsMixin,
):
    """
    What [`GNDPOTrainer`] and [`GSPOTrainer`] stand on: [`~trl.GRPOTrainer`] that looks at its data before it loads a
    model, pays for real tokens, samples with vLLM from the prompts that it scores, goes on exactly from its checkpoints,
    keeps NaN out of its weights, validates at a temperature of its own, says what it is doing in steps that take long, and
    logs completions with images to wandb.
    """

    def __init__(self, *args, **kwargs):
        named = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        check_learned_prompts(named.get("args"), named.get("model"), named.get("peft_config"))
        if named.get("args") is not None:
            check_datasets(
                named["args"],
                named.get("train_dataset"),
                named.get("eval_dataset"),
                named.get("reward_funcs"),
                brings_columns=any(named.get(name) is not None for name in ("environment_factory", "rollout_func")),
            )
            check_best_metric(named["args"], named.get("eval_dataset"))
        super().__init__(*args, **kwargs)
        check_images_are_read(self)
        self._trains_on_images = None

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        if self.state.global_step == 0 and isinstance(self.train_dataset, IterableDataset):
            needed = self.args.generation_batch_size // self.args.num_generations
            raise ValueError(
                f"`train_dataset` ended before a single step was made: a generation batch takes {needed} prompts. Give "
                "more, or lower `per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation`."
            )
        return output

    def _begin_run(self):
        super()._begin_run()
        self._trains_on_images = None

    def _generate_and_score_completions(self, inputs):
        has_images = check_images_alike(inputs, self._trains_on_images if self.model.training else None)
        if self.model.training:
            self._trains_on_images = has_images
        return super()._generate_and_score_completions(inputs)
