"""Two steps on every rank with a teacher behind servers; `test_server_teacher.py` launches it with the options."""

import json
import sys
from collections import Counter
from pathlib import Path

import tiny_models
from datasets import Dataset

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.teachers import LocalTeacher


student, teacher, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
rows = [
    {"prompt": [{"role": "user", "content": "what is the sum ?"}], "images": [tiny_models.draw_image(index)]}
    for index in range(8)
]
trainer = GNDPOTrainer(model=student, args=GNDPOConfig(**options), train_dataset=Dataset.from_list(rows))
local = LocalTeacher(teacher)
local.tokenizer = trainer._tokenizer
local.prepare(trainer.model, trainer.accelerator, trainer._per_token_logps)

differences, requests = [], Counter()
ask, answer = trainer.teacher.servers._try, trainer.teacher.per_token_logps


def count(url, *args):
    requests[url] += 1
    return ask(url, *args)


def compare(rollout):
    logps, mask = answer(rollout), valid_tokens(rollout)
    differences.append((logps - local.per_token_logps(rollout))[mask].abs().max().item())
    return logps


trainer.teacher.servers._try, trainer.teacher.per_token_logps = count, compare
trainer.train()
report = {"differences": differences, "requests": [requests[url] for url in options["teacher_server_url"]]}
Path(options["output_dir"], f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(report))
