"""Two steps on every rank, colocated or with a server; `test_two_ranks.py` launches it with the trainer's options."""

import json
import sys
from pathlib import Path

import tiny_models
from datasets import Dataset
from peft import LoraConfig
from trainers import Trainer, logged, some_reward
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from vllm_stand_ins import start_engine, update_named_params

from gndpo_trl.grpo.vllm import VLLMConfig, logp_difference


vllm_generation.LLM = start_engine
VLLMClient.init_communicator = lambda client, device: None
VLLMClient.update_named_params = update_named_params

model, options = sys.argv[1], json.loads(sys.argv[2])
adapter = options.pop("adapter", None)
rows = [
    {"prompt": [{"role": "user", "content": "what is the sum ?"}], "images": [tiny_models.draw_image(index)]}
    for index in range(8)
]


class RankTrainer(Trainer):
    """Remembers the differences of the rank's own tokens; what is logged is of all ranks."""

    def _watch_sampling_logps(self, rollout, logps):
        super()._watch_sampling_logps(rollout, logps)
        self.differences.append(
            logp_difference(rollout["sampling_per_token_logps"], logps, rollout["completion_mask"])
        )
        self.samples.append(rollout["sampling_per_token_logps"].sum().item())


RankTrainer.differences, RankTrainer.samples = [], []
trainer = RankTrainer(
    model=model,
    reward_funcs=some_reward,
    args=VLLMConfig(**options),
    train_dataset=Dataset.from_list(rows),
    peft_config=adapter and LoraConfig(**adapter),
)
assert (trainer.vllm_generation.adapter is None) == (adapter is None)
trainer.train()
report = {
    "own": [largest for _, largest in trainer.differences],
    "samples": trainer.samples,
    "all": logged(trainer, "sampling/logp_difference/max"),
}
Path(options["output_dir"], f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(report))
