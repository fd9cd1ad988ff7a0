"""Each thing that we rely on in TRL without a promise. A failure here says what TRL changed; start reading there."""

import contextlib
import inspect
import re

import tiny_models
import torch
import trl
from transformers import AttentionInterface, Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import think_format_reward
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from gndpo_trl import GNDPOTrainer
from gndpo_trl.grpo import trl_hooks


def test_overridden_methods_exist_with_the_expected_parameters():
    for name, parameters in trl_hooks.OVERRIDDEN_METHODS.items():
        method = getattr(GRPOTrainer, name, None)
        assert method is not None, f"TRL {trl.__version__} has no GRPOTrainer.{name} any more"
        if parameters is not None:
            assert tuple(inspect.signature(method).parameters) == parameters, f"GRPOTrainer.{name} changed"


def test_scoring_takes_exactly_the_multimodal_inputs_that_we_pass():
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    first = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert parameters[:6] == first, "_get_per_token_logps_and_entropies changed its first parameters"
    own_options = {"compute_entropy", "compute_aux_loss"}
    multimodal = set(parameters[6:]) - own_options
    assert multimodal == set(trl_hooks.MULTIMODAL_KEYS), (
        f"TRL's multimodal inputs changed: new {multimodal - set(trl_hooks.MULTIMODAL_KEYS)}, "
        f"gone {set(trl_hooks.MULTIMODAL_KEYS) - multimodal}. Update MULTIMODAL_KEYS."
    )


def test_every_argument_of_grpo_trainer_is_taken_in_the_same_order():
    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters)
    ours = list(inspect.signature(GNDPOTrainer.__init__).parameters)
    assert ours[: len(theirs)] == theirs, "GRPOTrainer.__init__ has other parameters; pass them on"


def test_the_loss_reads_old_logps_after_the_forward_pass():
    """`sequence_token` replaces `old_per_token_logps` from within the forward pass."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    forward = source.find("self._get_per_token_logps_and_entropies(")
    read = source.find('inputs.get("old_per_token_logps")')
    assert 0 <= forward < read, "GRPOTrainer._compute_loss no longer reads the old log-probs after its forward pass"


def test_the_token_level_ratio_is_where_sequence_token_needs_it():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert 'self.importance_sampling_level == "token"' in source, "TRL's token-level ratio has moved"


def test_advice_on_levels_is_what_we_keep_back(make_config, checkpoints, text_dataset, caplog):
    for loss_type, level in (("luspo", "token"), ("vespo", "sequence")):
        config = make_config(GRPOConfig, loss_type=loss_type, importance_sampling_level=level)
        for is_kept_back in (False, True):
            caplog.clear()
            with trl_hooks.without_advice_on_levels() if is_kept_back else contextlib.nullcontext():
                GRPOTrainer(checkpoints["qwen3-student"], think_format_reward, args=config, train_dataset=text_dataset)
            advice = [record for record in caplog.records if "importance_sampling_level" in record.getMessage()]
            assert bool(advice) != is_kept_back


def test_the_kinds_of_losses_are_the_known_ones():
    """Rows are regrouped for losses whose gradient does not depend on which rows share a micro-batch."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    source = source[source.index("loss = ((per_token_loss * mask)") :]  # from here on, the kinds of means
    row_means = ('== "dr_grpo"', '== "luspo"')
    assert all(f"self.loss_type {kind}:" in source for kind in row_means), "a mean over rows has changed"
    assert 'self.loss_type in ["cispo", "dapo", "vespo"]:' in source, "the sums over tokens have changed"
    assert 'self.loss_type == "bnpo":' in source, "the mean over a micro-batch's tokens has changed"
    names = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"self\.loss_type (?:==|in) (.*):", source))))
    known = {*trl_hooks.ROW_MEAN_LOSSES, *trl_hooks.TOKEN_SUM_LOSSES, "bnpo"}
    assert names <= known, f"TRL has new losses: {names - known}"


def test_scoring_does_nothing_with_the_model_but_to_call_it():
    """A function stands in the model's place, which takes the prompts' labels away."""
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    source = re.sub(r"#.*", "", source.split("all_logps = []")[1])
    uses = re.findall(r"\bmodel\b.{0,12}", source)
    assert uses == ["model(**model_inp"], f"TRL also uses the model in other ways: {uses}"
    assert "labels=labels, fused_lm_head=True" in source, "TRL hands over the labels in another way"


def test_every_metric_of_the_loss_is_known():
    """Those of a micro-batch are weighted by its tokens or rows; extremes say so in their names."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    names = set(re.findall(r'self\._metrics\[mode\]\["([^"]+)"\]\.append', source))
    token_means = {"kl", "entropy", "cispo_clip_ratio"} | {
        f"clip_ratio/{kind}_mean" for kind in ("low", "high", "region")
    }
    extremes = {"clip_ratio/low_min", "clip_ratio/high_max"}
    not_regrouped = {"policy_loss", "entropy_coef", "aux_loss"}  # rows are not regrouped where these are logged
    known = token_means | extremes | not_regrouped | {*trl_hooks.ROW_METRICS}
    assert names == known, f"TRL logs other metrics from its loss: {names ^ known}"


def test_rewards_get_the_known_arguments():
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    names = {*re.findall(r'(?<!row_)reward_kwargs\["(\w+)"\] =', source)}
    call = re.search(r"reward_func\(\s*(prompts=[^*]*)\*\*reward_kwargs", source)
    names |= {*re.findall(r"(\w+)=", call[1])}
    assert names == {*trl_hooks.REWARD_ARGUMENTS}, f"TRL passes other arguments: {names}"


def test_ranks_wait_for_each_other_at_the_end_of_the_rewards():
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert source.count("gather(") == 2  # asyncio's, and that of the ranks
    assert source.rstrip().endswith("rewards_per_func = gather(rewards_per_func)\n        return rewards_per_func")


def test_the_trainer_state_is_the_last_thing_in_a_checkpoint():
    source = inspect.getsource(Trainer._save_checkpoint)
    order = [
        source.find(step) for step in ("self.save_model(", "_save_optimizer_and", "_save_rng_state", "save_to_json")
    ]
    assert -1 not in order and order == sorted(order), "transformers writes checkpoints in another order"


def test_rollouts_and_logs_have_the_expected_form(make_config, checkpoints, text_dataset):
    """GRPOTrainer's own rollout, before anything of ours touches it."""
    config = GRPOConfig(**{
        key: value
        for key, value in make_config().to_dict().items()
        if key in ("output_dir", "use_cpu", "bf16", "gradient_checkpointing", "report_to", "max_completion_length")
    }, per_device_train_batch_size=4, num_generations=2)  # fmt: skip
    trainer = GRPOTrainer(
        checkpoints["qwen3-student"],
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        args=config,
        train_dataset=text_dataset,
    )
    missing = [name for name in trl_hooks.ATTRIBUTES if not hasattr(trainer, name)]
    assert not missing, f"GRPOTrainer of TRL {trl.__version__} has no {missing} any more"
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([text_dataset[0]] * 2 + [text_dataset[1]] * 2)
    for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        assert rollout[key].shape[0] == 4, f"the rollout has no {key}"
    assert rollout["advantages"].shape == (4,)
    for name in trl_hooks.REWARD_METRICS:
        assert len(trainer._metrics["train"][name]) == 1, f"TRL no longer logs `{name}` once per generation batch"
    assert len(trainer._logs["advantages"]) == 4
    assert len(trainer._logs["rewards"]["<lambda>"]) == 4
    assert isinstance(trainer.eos_token_ids, list)

    trainer.args.steps_per_generation = 2
    rows, before = [text_dataset[0]] * 4, trainer._buffered_inputs
    trainer._prepare_inputs(rows)
    buffered = trainer._buffered_inputs
    assert buffered is not before and len(buffered) == 2, "`_buffered_inputs` is not where micro-batches are kept"
    trainer._step = 1
    assert trainer._prepare_inputs(rows) is buffered[1] and trainer._buffered_inputs is buffered


def test_the_fused_head_gives_log_probs_and_never_calls_the_lm_head():
    model, _ = tiny_models.build_qwen3()
    input_ids = torch.randint(3, 20, (2, 6))
    with torch.no_grad():
        expected = model(input_ids).logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    add_fused_lm_head(model, temperature=1.0)
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        output = model(input_ids, labels=input_ids, fused_lm_head=True)
    assert isinstance(output, FusedCausalLMOutput)
    torch.testing.assert_close(output.log_probs, expected)
    assert not calls and "logits" not in output


def test_the_fused_head_can_leave_padding_out_on_cpus(monkeypatch):
    model, _ = tiny_models.build_qwen3()
    add_fused_lm_head(model, temperature=1.0)
    input_ids = torch.randint(3, 20, (2, 6))
    labels = input_ids.masked_fill(torch.arange(6) < 3, -100)
    projected = []
    apply = trl.trainer.utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        trl.trainer.utils._ChunkedLogProbFunction,
        "apply",
        lambda hidden, *args: projected.append(len(hidden)) or apply(hidden, *args),
    )
    with torch.no_grad():
        everywhere = model(input_ids, labels=labels, fused_lm_head=True).log_probs
        with trl_hooks.real_tokens_in_lm_head(input_ids.device):
            scored = model(input_ids, labels=labels, fused_lm_head=True).log_probs
    assert projected == [10, 6], "TRL decides elsewhere which positions its head projects"
    torch.testing.assert_close(scored, everywhere)


def test_the_fused_head_can_be_read():
    """It hands hidden states, weights and ids of the scored positions to one function, and returns what that returns."""
    names = list(inspect.signature(trl.trainer.utils._ChunkedLogProbFunction.forward).parameters)[1:]
    known = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
    assert names == [*known, "logit_scale", "outputs"], "TRL's chunked head takes other arguments"
    model, _ = tiny_models.build_qwen3()
    add_fused_lm_head(model, temperature=0.5)
    input_ids = torch.randint(3, 20, (2, 6))
    labels = input_ids.masked_fill(torch.arange(6) < 3, -100)
    calls = []

    def read(call):
        calls.append(call)
        return call.hidden.sum(-1), None, None, None, None

    hidden = model.model(input_ids).last_hidden_state[:, 2:5]
    with trl_hooks.lm_head_read_by(read):
        log_probs = model(input_ids, labels=labels, fused_lm_head=True).log_probs
    (call,) = calls
    torch.testing.assert_close(call.hidden, hidden.flatten(0, 1))
    assert (
        call.weight is model.lm_head.weight and call.temperature == 0.5 and (call.softcap, call.scale) == (None, 1.0)
    )
    assert torch.equal(call.ids, input_ids[:, 3:].flatten())
    torch.testing.assert_close(log_probs[:, 2:], hidden.sum(-1))
    before = model(input_ids, labels=labels, fused_lm_head=True).log_probs  # TRL's own again
    with trl_hooks.lm_head_read_by(lambda call: call.compute()):
        assert torch.equal(model(input_ids, labels=labels, fused_lm_head=True).log_probs[:, 2:], before[:, 2:])


def test_shared_prompts_reach_the_attention_as_they_are():
    """The fused head takes pre-shifted labels; models hand on keywords, and masks of four dimensions as they are."""
    model, _ = tiny_models.build_qwen3()
    missing = [name for name in trl_hooks.MODEL_ATTRIBUTES if not hasattr(model, name)]
    assert not missing, f"models of transformers have no {missing} any more"
    handed_on = []

    def attend(module, query, key, value, attention_mask, shared_prompts=None, **kwargs):
        handed_on.append((attention_mask, shared_prompts))
        return query.transpose(1, 2), None

    AttentionInterface.register("watched", attend)
    model.config._attn_implementation = "watched"
    add_fused_lm_head(model, temperature=1.0)
    input_ids, mask, label = torch.randint(3, 20, (1, 6)), torch.ones(1, 1, 1, 1, dtype=torch.bool), object()
    labels = input_ids.roll(-1).masked_fill(torch.arange(6) < 3, -100)
    output = model(input_ids, attention_mask=mask, shift_labels=labels, shared_prompts=label, fused_lm_head=True)
    assert output.log_probs.shape == (1, 6) and not output.log_probs[0, :3].any() and output.log_probs[0, 3:].all()
    assert handed_on == [(mask, label)] * 2
