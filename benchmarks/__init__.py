"""
The scripts behind the tables in `docs/`, as commands of the repository's root:

    python -m benchmarks.arms                   many ways to train, on the same models and prompts: docs/evidence.md
    python -m benchmarks.arms.gradient_noise    how noisy the gradient of each of them is
    python -m benchmarks.arms.moments           how well a batch knows the statistics that scores are divided by
    python -m benchmarks.arms.pretrained        some of them on a pretrained language model
    python -m benchmarks.arms.report            the tables and figures of all these
    python benchmarks/step_cost.py              what a step costs beside those of TRL's trainers: docs/step_cost.md
    python -m benchmarks.cost.memory_table      memory per GPU: docs/launching.md
    python -m benchmarks.cost.sampling_logps    what the sampler's log-probs change: docs/step_cost.md
    python -m benchmarks.cost.served_teacher    what a teacher behind a server costs: docs/teachers.md
    python -m benchmarks.cost.overlap           what sampling ahead saves: docs/overlap.md
    python -m benchmarks.other_family           a teacher of another tokenizer: docs/teachers.md
"""
