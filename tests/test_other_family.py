"""Teachers of another family: what they read, what they say of it, and what is learned of that."""

import math

import other_tokenizers
import pytest
import tiny_models
import torch
from datasets import Dataset
from helpers import assert_resumes_in_the_middle, assert_same_gradients, gradients, make_rollout, plain_logps
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3ForCausalLM

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.estimators import Sampled
from gndpo_trl.grpo.checkpoints import RunCannotGoOn
from gndpo_trl.objective.scores import Score, piece_sums
from gndpo_trl.teachers import LocalTeacher, OtherFamily
from gndpo_trl.teachers.compatibility import describe


# What every tokenizer here can write.
WORDS_ALONE = {"suppress_tokens": [0, 1, *range(3, 3 + len(tiny_models.SPECIAL_TOKENS))]}


def save_teacher(folder, tokenizer, seed: int = 1) -> str:
    return tiny_models.save(*tiny_models.build_qwen3(seed=seed, width=48, tokenizer=tokenizer), folder)


@pytest.fixture(scope="module")
def others(checkpoints, tmp_path_factory) -> dict[str, str]:
    """Paths of teachers over bytes, SentencePiece's marks, and characters."""
    root = tmp_path_factory.mktemp("others")
    return {
        "bytes": checkpoints["other-teacher"],
        "marks": save_teacher(root / "marks", other_tokenizers.with_space_marks()),
        "characters": save_teacher(root / "characters", other_tokenizers.over_characters()),
    }


def rows_of(trainer, count: int = 8) -> list[dict]:
    return [trainer.train_dataset[index // 2] for index in range(count)]


def read(trainer, rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and pieces of a rollout, as its trainer gets them."""
    question = {**rollout, "rows": rows_of(trainer, len(rollout["completion_ids"]))}
    trainer.teacher.start(question)
    pieces = trainer.teacher.pieces(question)
    return trainer.teacher.per_token_logps(question), pieces


@pytest.mark.parametrize("share_prompts", [True, False])
def test_the_same_tokenizer_gives_the_scores_of_ids(make_trainer, share_prompts):
    options = {"share_prompts": share_prompts, "per_device_train_batch_size": 8}
    by_text, by_id = make_trainer(teacher_alignment="text", **options), make_trainer(**options)
    rollout = make_rollout(by_id)
    mask = rollout["completion_mask"].bool()
    assert mask[:, -1].any() and not mask[:, -1].all()  # some are cut off, some end
    question = {**rollout, "rows": rows_of(by_id)}
    logps, pieces = read(by_text, rollout)
    torch.testing.assert_close(logps[mask], by_id.teacher.per_token_logps(question)[mask], rtol=0, atol=1e-6)
    assert (pieces[:, 1:] > pieces[:, :-1]).all()


def test_the_same_tokenizer_gives_the_gradients_of_ids(make, checkpoints):
    options = {"trainer_options": {"teacher_model": checkpoints["qwen3-teacher"], "reward_funcs": None}}
    by_text, by_id = (
        gradients(make(GNDPOTrainer, GNDPOConfig, teacher_alignment=how, **options)) for how in ("text", "ids")
    )
    assert_same_gradients(by_text, by_id)


def test_a_permuted_vocabulary_gives_the_scores_of_ids(make_trainer, checkpoints, tmp_path):
    """Other ids, the same strings: rows of the embeddings and of the head in another order."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen3-teacher"])
    words = [*tiny_models.WORDS]
    words.reverse()
    permuted = tiny_models.build_tokenizer()
    first = len(tokenizer) - len(words)
    backend = permuted.backend_tokenizer
    vocab = {token: id for token, id in tokenizer.get_vocab().items() if id < first}
    vocab.update({word: first + place for place, word in enumerate(words)})
    backend.model = type(backend.model)(vocab, unk_token="<|unk|>")
    permuted = permuted.__class__(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        extra_special_tokens=tiny_models.SPECIAL_TOKENS,
        chat_template=tiny_models.CHAT_TEMPLATE,
    )
    teacher = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-teacher"])
    order = [tokenizer.convert_tokens_to_ids(permuted.convert_ids_to_tokens(id)) for id in range(len(tokenizer))]
    assert order != sorted(order)
    for weights in (teacher.get_input_embeddings().weight, teacher.get_output_embeddings().weight):
        weights.data = weights.data[order]
    path = tiny_models.save(teacher, permuted, tmp_path / "permuted")
    with pytest.raises(ValueError, match='tokenizers of student and teacher disagree.*set `teacher_alignment="text"`'):
        make_trainer(teacher_model=path)
    by_text, by_id = make_trainer(teacher_model=path, teacher_alignment="text"), make_trainer()
    rollout = make_rollout(by_id)
    mask = rollout["completion_mask"].bool()
    expected = by_id.teacher.per_token_logps({**rollout, "rows": rows_of(by_id)})
    torch.testing.assert_close(read(by_text, rollout)[0][mask], expected[mask], rtol=0, atol=1e-6)


def sums_by_hand(path: str, messages: list, text: str, parts: list[str]) -> list[float]:
    """What a teacher over characters says of each part of a text and of its end, one forward pass for each character."""
    model, tokenizer = Qwen3ForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt)["input_ids"]
    assert "".join(parts) == text
    sums = []
    for part in [*map(list, parts), ["<end>"]]:
        total = 0.0
        for character in part:
            id = tokenizer.convert_tokens_to_ids(character)
            with torch.no_grad():
                total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[id].item()
            ids.append(id)
        sums.append(total)
    return sums


def test_a_teacher_over_characters_scores_words(make_trainer, others, text_dataset):
    trainer = make_trainer(teacher_model=others["characters"], teacher_alignment="text")
    words = trainer._tokenizer
    ids = words("what is the sum ?")["input_ids"] + [words.eos_token_id]
    rollout = {
        "prompt_ids": torch.zeros(1, 1, dtype=torch.long),
        "prompt_mask": torch.ones(1, 1, dtype=torch.long),
        "completion_ids": torch.tensor([[*ids, 0]]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0]]),
        "rows": [text_dataset[0]],
    }
    trainer.teacher.start(rollout)
    assert trainer.teacher.pieces(rollout).tolist() == [[*range(7)]]
    found = trainer.teacher.per_token_logps(rollout)[0, :-1]
    parts = ["what", " is", " the", " sum", " ?"]
    expected = sums_by_hand(others["characters"], text_dataset[0]["prompt"], "what is the sum ?", parts)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


def test_a_teacher_over_words_scores_characters(make_trainer, checkpoints, text_dataset, tmp_path):
    """Each character of a word is given an even share, and answers for the whole."""
    student = save_teacher(tmp_path / "student", other_tokenizers.over_characters(), seed=0)
    trainer = make_trainer(model=student, teacher_alignment="text")
    characters = trainer._tokenizer
    ids = characters("the sum")["input_ids"] + [characters.eos_token_id]
    rollout = {
        "prompt_ids": torch.zeros(1, 1, dtype=torch.long),
        "prompt_mask": torch.ones(1, 1, dtype=torch.long),
        "completion_ids": torch.tensor([ids]),
        "completion_mask": torch.ones(1, len(ids), dtype=torch.long),
        "rows": [text_dataset[0]],
    }
    trainer.teacher.start(rollout)
    pieces = trainer.teacher.pieces(rollout)
    assert pieces.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]]
    found = trainer.teacher.per_token_logps(rollout)

    teacher, words = trainer.teacher.teacher.model, AutoTokenizer.from_pretrained(checkpoints["qwen3-teacher"])
    prompt = words.apply_chat_template(text_dataset[0]["prompt"], add_generation_prompt=True)["input_ids"]
    alone = {"prompt_ids": torch.tensor([prompt]), "prompt_mask": torch.ones(1, len(prompt))}
    alone["completion_ids"] = torch.tensor([words("the sum")["input_ids"] + [words.eos_token_id]])
    alone["completion_mask"] = torch.ones(1, 3)
    the, sum_, end = plain_logps(Qwen3ForCausalLM.from_pretrained(teacher.config._name_or_path), alone)[0].tolist()
    expected = torch.tensor([[the / 3] * 3 + [sum_ / 4] * 4 + [end]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_scores_of_pieces_of_numbers_computed_by_hand():
    teacher, old = torch.tensor([[-1.0, -1.0, -2.0, -9.0]]), torch.tensor([[-0.5, -2.5, -3.0, -1.0]])
    pieces, mask = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[1, 1, 1, 0]])
    scores = Score(clip=None)(teacher, old, mask, pieces=pieces)
    assert scores.shaped.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert scores.raw.tolist() == [[0.5, 0.5, 1.0, 0.0]]
    assert Score(clip=0.75)(teacher, old, mask, pieces=pieces).shaped.tolist() == [[0.75, 0.75, 0.75, 0.0]]
    power = Score(clip=None, power=1.0)(teacher, old, mask, pieces=pieces).shaped
    expected = [math.exp(-2) - math.exp(-3)] * 2 + [math.exp(-2) - math.exp(-3), 0.0]
    torch.testing.assert_close(power, torch.tensor([expected]))
    reference = torch.tensor([[-1.5, -1.5, -2.0, 0.0]])
    far = Score(clip=None, extrapolation=2.0)(teacher, old, mask, reference, pieces)
    assert far.shaped.tolist() == [[2.0, 2.0, 1.0, 0.0]] and far.raw.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    alone = torch.arange(4)[None]
    plain = Score()(teacher, old, mask)
    for found, expected in zip(Score()(teacher, old, mask, pieces=alone), plain, strict=True):
        assert torch.equal(found, expected)


def test_the_score_of_a_piece_is_the_gradient_of_the_divergence_over_pieces():
    """A student over two characters, a teacher over the four words of two: exact expectations, no sampling."""
    torch.manual_seed(0)
    first, second = torch.randn(2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    teacher = torch.randn(4, dtype=torch.float64).log_softmax(-1)
    parameters = [first.requires_grad_(), second.requires_grad_()]
    tokens = torch.stack([first.log_softmax(-1)[:, None].expand(2, 2), second.log_softmax(-1)], dim=-1).view(4, 2)
    words = tokens.sum(-1)
    expected = torch.autograd.grad((words.exp() * (words - teacher)).sum(), parameters, retain_graph=True)
    pieces, mask = torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2)
    shares = (teacher / 2)[:, None].expand(4, 2)
    scores = Score(clip=None)(shares, tokens.detach(), mask, pieces=pieces)
    differences = []
    for of_tokens in (scores.shaped, scores.raw):
        objective = -(words.exp().detach()[:, None] * of_tokens * tokens).sum()
        found = torch.autograd.grad(objective, parameters, retain_graph=True)
        differences.append(max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)))
    whole, share = differences
    assert whole < 1e-12 < 1e-2 < share


@pytest.mark.parametrize("family", ["bytes", "marks", "characters"])
def test_a_run_with_a_teacher_of_another_family(make_trainer, others, family):
    """Score, advantages, logs: each token of a piece has the advantage of the piece."""
    options = {"generation_kwargs": WORDS_ALONE, "max_steps": 3}
    trainer = make_trainer(teacher_model=others[family], teacher_alignment="text", **options)
    rollout = make_rollout(trainer)
    logps, pieces = read(trainer, rollout)
    assert torch.equal(rollout["pieces"], pieces)
    mask = rollout["completion_mask"].bool() & ~logps.isnan()
    assert mask.sum() > 0.8 * rollout["completion_mask"].sum()
    student = plain_logps(trainer.model, rollout)
    scores = piece_sums(logps.nan_to_num() - student, pieces, mask).clamp(-5, 5)
    expected = (scores - scores[mask].mean()) / scores[mask].std()
    torch.testing.assert_close(rollout["advantages"][mask], expected[mask], rtol=0, atol=1e-3)
    metrics = trainer._metrics["train"]
    assert metrics["teacher/unknown_tokens"] == [(rollout["completion_mask"].bool() & ~mask).sum().item()]
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("options", [{"advantage_normalization": "none"}, {"num_iterations": 2}], ids=str)
def test_scores_that_are_made_in_the_loss_are_those_of_pieces(make, others, tmp_path, options):
    """In one pass and in two, the same gradients; the student's words are up to six of its tokens, and the teacher's one."""
    student = save_teacher(tmp_path / "student", other_tokenizers.over_characters(), seed=0)
    options = {
        "trainer_options": {"teacher_model": others["bytes"], "reward_funcs": None},
        "model": student,
        **options,
    }
    made = [make(GNDPOTrainer, GNDPOConfig, teacher_alignment="text", **options) for _ in range(2)]
    made[1].in_one_pass = False
    assert_same_gradients(*map(gradients, made))


def test_it_goes_on_in_the_middle_of_a_generation_batch(make_trainer, others, tmp_path):
    assert_resumes_in_the_middle(make_trainer, tmp_path, teacher_model=others["bytes"], teacher_alignment="text")


def test_it_is_there_in_evaluation(make_trainer, others, text_dataset):
    options = {"trainer_options": {"eval_dataset": text_dataset.select(range(4))}, "per_device_eval_batch_size": 4}
    trainer = make_trainer(teacher_model=others["bytes"], teacher_alignment="text", **options)
    assert math.isfinite(trainer.evaluate()["eval_reverse_kl"])


def test_a_student_learns_from_a_teacher_of_another_family(make_trainer, others):
    trainer = make_trainer(
        teacher_model=others["characters"],
        teacher_alignment="text",
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        generation_kwargs=WORDS_ALONE,
    )
    trainer.train()
    found = [entry["reverse_kl"] for entry in trainer.state.log_history if "reverse_kl" in entry]
    assert sum(found[-5:]) < sum(found[:5]) - 5


def test_it_reads_messages_texts_and_prompts_of_its_own(make_trainer, others, capsys):
    rows = [
        {"prompt": [{"role": "user", "content": "one <end>"}], "teacher_prompt": None},
        {"prompt": [{"role": "user", "content": "one"}], "teacher_prompt": [{"role": "user", "content": "two"}]},
    ]
    trainer = make_trainer(
        teacher_model=others["bytes"],
        teacher_alignment="text",
        trainer_options={"train_dataset": Dataset.from_list(rows)},
    )
    rollout = make_rollout(trainer, count=4)
    rows = [rows[0], rows[0], rows[1], rows[1]]
    rows[3] = {**rows[1], "teacher_prompt": "Say two:<turn>"}
    trainer.teacher.start({**rollout, "rows": rows})
    theirs, tokenizer = trainer.teacher.asked.question, AutoTokenizer.from_pretrained(others["bytes"])
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(theirs["prompt_ids"], theirs["prompt_mask"], strict=True)
    ]
    # The end token that a prompt writes out is text.
    assert texts[0] == "<turn>user\none <\u200bend><end>\n<turn>assistant\n"
    assert texts[2] == "<turn>user\ntwo<end>\n<turn>assistant\n"
    assert texts[3] == "Say two:<turn>"
    assert (theirs["prompt_ids"] == tokenizer.convert_tokens_to_ids("<end>")).sum().item() == 3
    assert "A prompt as the teacher reads it:\n<turn>user" in capsys.readouterr().out


def test_a_turn_ends_as_either_ends_it(checkpoints, others):
    student, teacher = describe("model", checkpoints["qwen3-student"]), OtherFamily(LocalTeacher(others["bytes"]))
    tokenizer, theirs = student.tokenizer, AutoTokenizer.from_pretrained(others["bytes"])
    tokenizer.add_tokens(["<turn>", "<other>"], special_tokens=True)
    turn, other, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<turn>", "<other>", "<|im_end|>"))
    student.generation_config.eos_token_id = [end, turn, other]
    teacher.check(student)
    their_turn, their_end = theirs.convert_tokens_to_ids(["<turn>", "<end>"])
    assert teacher.translator.ends == {end: their_end, turn: their_turn, other: their_end}
    # A student that ends with another token than its template does: with `<turn>`, which the teacher has for something else.
    tokenizer.eos_token, student.generation_config.eos_token_id = "<turn>", turn
    teacher.check(student)
    assert teacher.translator.ends == {turn: their_end}


def test_text_goes_on_as_text(make_trainer, others):
    """After a prompt of text, a word begins with the space that separates it."""
    rows = Dataset.from_dict({"prompt": ["what is the", "the sum of"]})
    trainer = make_trainer(
        teacher_model=others["bytes"], teacher_alignment="text", trainer_options={"train_dataset": rows}
    )
    rollout = make_rollout(trainer, count=4)
    rollout["completion_ids"][:, 0] = trainer._tokenizer.convert_tokens_to_ids("sum")
    trainer.teacher.start({**rollout, "rows": rows_of(trainer, 4)})
    theirs, tokenizer = trainer.teacher.asked.question, AutoTokenizer.from_pretrained(others["bytes"])
    for row in range(4):
        parts = [theirs[f"{part}_ids"][row][theirs[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")]
        assert tokenizer.decode(torch.cat(parts)).startswith(rows[row // 2]["prompt"] + " sum")


def test_images_go_through_the_teachers_own_processor(make_trainer, checkpoints, image_dataset):
    """InternVL's pictures have other sizes and other numbers of tokens than Qwen2.5-VL's."""
    with pytest.raises(ValueError, match='placeholder is token id.*set `teacher_alignment="text"`'):
        make_trainer("qwen25vl", teacher_model=checkpoints["internvl-teacher"])
    trainer = make_trainer("qwen25vl", teacher_model=checkpoints["internvl-teacher"], teacher_alignment="text")
    rollout = make_rollout(trainer)
    question = {**rollout, "rows": rows_of(trainer)}
    trainer.teacher.start(question)
    theirs = trainer.teacher.asked.question
    assert (
        theirs["num_images"] == [1, 1, 2, 2, 1, 1, 2, 2]
        and "image_grid_thw" in rollout
        and "image_grid_thw" not in theirs
    )
    # Word by word the two have one vocabulary, so that a plain forward pass says what they have to be.
    mask = rollout["completion_mask"].bool()
    assert torch.equal(theirs["completion_ids"][mask], rollout["completion_ids"][mask])
    teacher = AutoModelForImageTextToText.from_pretrained(checkpoints["internvl-teacher"])
    found = trainer.teacher.per_token_logps(question)
    torch.testing.assert_close(found[mask], plain_logps(teacher, theirs)[mask], rtol=0, atol=1e-5)
    trainer.train()


def test_teachers_of_several_families_in_one_run(make_trainer, checkpoints, others, text_dataset):
    names = ["same", "bytes", "marks"]
    dataset = text_dataset.add_column("teacher", [names[index % 3] for index in range(len(text_dataset))])
    teachers = {name: OtherFamily(LocalTeacher(others[name])) for name in names[1:]}
    trainer = make_trainer(
        teacher_model={"same": checkpoints["qwen3-teacher"], **teachers},
        trainer_options={"train_dataset": dataset},
        remove_unused_columns=False,
        advantage_normalization="teacher",
    )
    rollout = make_rollout(trainer)
    assert [trainer.teacher.renders_rows(rows_of(trainer))[index] for index in (0, 2, 4, 6)] == [
        False,
        True,
        True,
        False,
    ]
    mask = rollout["completion_mask"].bool()
    question = {**rollout, "rows": rows_of(trainer)}
    found = trainer.teacher.per_token_logps(question)
    alone = make_trainer()
    expected = alone.teacher.per_token_logps({**rollout, "rows": rows_of(alone)})
    mine = torch.tensor([True, True, False, False, False, False, True, True])
    torch.testing.assert_close(found[mine][mask[mine]], expected[mine][mask[mine]], rtol=0, atol=1e-5)
    single = make_trainer(teacher_model=others["bytes"], teacher_alignment="text")
    expected, pieces = read(single, rollout)
    torch.testing.assert_close(found[2:4], expected[2:4], rtol=0, atol=1e-5, equal_nan=True)
    assert torch.equal(rollout["pieces"][2:4], pieces[2:4])
    assert torch.equal(rollout["pieces"][0], torch.arange(mask.size(1)))
    trainer.train()


def test_a_run_whose_texts_the_teacher_cannot_read_ends(make_trainer, checkpoints, tmp_path):
    path = save_teacher(tmp_path / "lowercase", other_tokenizers.over_lowercase_words())
    trainer = make_trainer(teacher_model=path, teacher_alignment="text", generation_kwargs={"suppress_tokens": [2]})
    with pytest.raises(
        RunCannotGoOn, match=r"reads \d+ of \d+ tokens of a batch otherwise.*share of 0.05.*`OtherFamily"
    ):
        trainer.train()
    make_trainer(teacher_model=OtherFamily(LocalTeacher(path), max_unknown=1.0)).train()


def test_a_teacher_that_is_broken_is_not_forgiven(make_trainer, others):
    trainer = make_trainer(teacher_model=others["bytes"], teacher_alignment="text")
    trainer.teacher.teacher.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="The teacher gave non-finite log-probs"):
        make_rollout(trainer)


class EvenShares(Sampled):
    """The other choice, which is measured beside it."""

    def advantages(self, scores, reading, mask, population):
        return scores.raw, None


def test_an_estimator_of_ones_own_has_both_choices(make_trainer, others):
    trainer = make_trainer(
        teacher_model=others["bytes"], teacher_alignment="text", trainer_options={"estimator": EvenShares()}
    )
    trainer.train()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"estimator": "exact"},
            "`estimator` is 'exact', which does not go with `teacher_alignment=\"text\"`.*other tokens",
        ),
        ({"score_baseline": "expected"}, "`score_baseline` is 'expected', which does not go"),
        ({"estimator": "exact", "teacher_top_k": 4}, "`estimator` is 'exact'"),
        ({"score_discount": 0.5}, "`score_discount` is 0.5.*whole piece"),
        ({"teacher_model_name_or_path": "self"}, '`teacher_model` is "self", which has the student\'s tokens'),
        ({"teacher_server_url": "http://localhost:1"}, "teacher's tokenizer is unknown.*`teacher_model_name_or_path`"),
    ],
    ids=str,
)
def test_what_needs_common_ids_is_refused(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(teacher_alignment="text", **options)


def test_tools_are_refused(make_trainer, others):
    trainer = make_trainer(teacher_model=others["bytes"], teacher_alignment="text")
    trainer.tools = [sum]  # as of a student whose chat template has room for them
    with pytest.raises(
        ValueError, match="`tools` is set, but then completions hold turns in the student's chat template"
    ):
        trainer._prepare_questions()


def test_a_teacher_without_a_chat_template_needs_prompts_of_text(make_trainer, tmp_path):
    tokenizer = other_tokenizers.over_bytes()
    tokenizer.chat_template = None
    trainer = make_trainer(teacher_model=save_teacher(tmp_path / "base", tokenizer), teacher_alignment="text")
    with pytest.raises(ValueError, match="no chat template of its own.*column `teacher_prompt` of text"):
        make_rollout(trainer)
