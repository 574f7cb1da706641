"""MeRF inside TRL's trainer: what the model saw, who was told, and the grade by the same object."""

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from trl_tiny import TASK, trainer

from reasonrl import tiny
from reasonrl.algos import Merf
from reasonrl.algos.base import make
from reasonrl.integrations.trl import Motivation, spec_reward
from reasonrl.models import Policy
from reasonrl.records import InputError, Problem, Rewards, Step, scored
from reasonrl.reward_spec import Case, Part, RewardSpec
from reasonrl.tasks import make_task

SPEC = RewardSpec((
    Part("length", (Case(0.5, "it is short", lambda c, p: len(c) < 4), Case(-0.5))),
    Part("answer", (Case(2.0, "it is the answer", lambda c, p: c == p.answer), Case(0.0))),
))  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXTS = [{"prompt": p.prompt, "answer": p.answer} for p in TASK.problems("train", 0, 40)]
CHATS = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in TEXTS]
PARTS = [{"type": "text", "text": "what is it"}]
VARIANTS = ("full", "score", "correctness_only", "adverse")


@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_and_messages_are_told(variant):
    words = SPEC.render(variant)
    told = Motivation(spec=SPEC, variant=variant)
    assert told.row(TEXTS[0]) == TEXTS[0] | {
        "prompt": f"{words}\n{TEXTS[0]['prompt']}",
        "plain_prompt": TEXTS[0]["prompt"],
    }
    user = CHATS[0]["prompt"][0]
    assert told.row(CHATS[0])["prompt"] == [{"role": "system", "content": words}, user]
    system = {"role": "system", "content": "Be brief."}
    found = told.row({"prompt": [system, user]})["prompt"]
    assert found == [{"role": "system", "content": f"Be brief.\n\n{words}"}, user]


def test_messages_of_parts_stay_one_type():
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": PARTS}]}])
    (row,) = Motivation(spec=SPEC).map(rows)
    first, second = row["prompt"]
    assert first["content"] == [{"type": "text", "text": SPEC.render()}]
    assert second["content"] == PARTS


@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["text", "chat"])
def test_a_data_set_is_told_by_the_share(rows):
    plain = Dataset.from_list(rows)
    told = Motivation(spec=SPEC, motivated=0.5).map(plain)
    whom = [a["prompt"] != b["prompt"] for a, b in zip(told, rows, strict=True)]
    assert 8 < sum(whom) < 32
    assert [row["plain_prompt"] for row in told] == [row["prompt"] for row in rows]
    assert plain[0] == rows[0]
    twice = Motivation(spec=SPEC, motivated=0.5).map(Dataset.from_list(rows[::-1]))
    assert [r["prompt"] for r in twice] == [r["prompt"] for r in told][::-1]
    more = Motivation(spec=SPEC, motivated=0.8).map(plain)  # who is told stays told
    kept = [a["prompt"] == b["prompt"] for a, b in zip(told, more, strict=True)]
    assert all(k for k, w in zip(kept, whom, strict=True) if w) and not all(kept)
    streamed = Motivation(spec=SPEC).map(IterableDataset.from_generator(lambda: iter(rows)))
    assert SPEC.render() in str(next(iter(streamed))["prompt"][:500]).replace("\\n", "\n")


def chatting():
    model, tokenizer = tiny.build(seed=0, width=32, layers=1, heads=2)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["text", "chat"])
def test_the_model_sees_what_it_sees_in_our_own_loop(tmp_path, rows):
    """Chat prompts: the ids of `Merf.prompt`. A text keeps its end, so that evaluation and training
    differ by the motivation alone."""
    model, tokenizer = chatting()
    spec = TASK.reward_spec()
    t = trainer(tmp_path, model=(model, tokenizer), motivation=Motivation(spec=spec),
                reward_funcs=spec_reward(spec), train_dataset=Dataset.from_list(rows))  # fmt: skip
    t.reward_funcs = [lambda completions, **_: [0.0] * len(completions)]
    t.model.train()
    output = t._generate_and_score_completions([dict(rows[i // 4]) for i in range(8)])
    seen = [ids[m.bool()].tolist() for ids, m in
            zip(output["prompt_ids"], output["prompt_mask"], strict=True)]  # fmt: skip
    if rows is CHATS:
        merf = make(Merf, TASK, Policy(model, tokenizer), {})
        problems = [Problem(str(i), row["prompt"]) for i, row in enumerate(rows[:2])]
        wanted = merf.prompt(problems)
    else:
        wanted = [tokenizer(f"{spec.render()}\n{r['prompt']}")["input_ids"] for r in rows[:2]]
    assert seen == [wanted[0]] * 4 + [wanted[1]] * 4
    assert tokenizer.unk_token_id not in seen[0]


def watched(t):
    """The prompts of every generation, by mode, as the model got them."""
    seen, generate = {"train": [], "eval": []}, t._generate_single_turn

    def single(prompt_ids, *more, **named):
        texts = [t.processing_class.decode(ids) for ids in prompt_ids]
        seen["train" if t.model.training else "eval"].append(texts)
        return generate(prompt_ids, *more, **named)

    t._generate_single_turn = single
    return seen


def test_a_run_tells_training_groups_whole_and_leaves_evaluation_plain(tmp_path):
    given = []

    def keep(prompts, plain_prompt=None, **columns):
        given.append((prompts, plain_prompt))
        return [None] * len(prompts)

    data = Dataset.from_list(TEXTS)
    t = trainer(tmp_path, motivation=Motivation(spec=SPEC, motivated=1.0, motivated_end=0.0),
                reward_funcs=[spec_reward(SPEC), keep], train_dataset=data, eval_dataset=data,
                per_device_train_batch_size=32, per_device_eval_batch_size=32, max_steps=5,
                gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=5,
                eval_on_start=True)  # fmt: skip
    seen = watched(t)
    t.train()
    words = SPEC.render()
    assert len(seen["train"]) == 5 and seen["eval"]
    assert not any(words in text for texts in seen["eval"] for text in texts)
    shares = []
    for texts in seen["train"]:
        groups = [texts[i : i + 4] for i in range(0, 64, 4)]
        assert all(len(set(group)) == 1 for group in groups)
        shares.append(sum(words in group[0] for group in groups) / len(groups))
    logged = [r["process/motivated"] for r in t.state.log_history if "process/motivated" in r]
    assert logged == shares and shares[0] == 1.0 and shares[-1] == 0.0
    assert 0.0 < shares[2] < 1.0 and shares == sorted(shares, reverse=True)
    told, plain = next(pair for pair in given if pair[1])  # an evaluation came first
    assert all(a == f"{words}\n{b}" for a, b in zip(told, plain, strict=True))
    assert "eval_rewards/reward_spec/mean" in [k for r in t.state.log_history for k in r]


def test_the_grade_is_the_objects_and_scorers_are_asked_the_plain_question(tmp_path):
    asked = []

    def scorer(rollout):
        asked.extend(p.prompt for p in rollout.problems)
        steps = [[Step(0, len(text), 1.0)] for text in rollout.text]
        return Rewards([scored(1.0)] * len(steps), steps=steps)

    t = trainer(tmp_path, motivation=Motivation(spec=SPEC), reward_funcs=spec_reward(SPEC),
                scorer=scorer, thinking=lambda r: asked.extend(p.prompt for p in r.problems)
                or [scored(0.5)] * len(r.text), train_dataset=Dataset.from_list(TEXTS))  # fmt: skip
    t.model.train()
    torch.manual_seed(0)
    t._generate_and_score_completions([dict(TEXTS[i // 4]) for i in range(8)])
    assert asked == [row["prompt"] for row in TEXTS[:2]] * 2
    grades = list(t._logs["rewards"]["reward_spec"])
    problems = [Problem("", "", TEXTS[i // 4]["answer"]) for i in range(8)]
    said = list(t._logs["completion"])
    assert grades == [SPEC.grade(c, p) for c, p in zip(said, problems, strict=True)]


@pytest.mark.parametrize("how", ["gated", "sum", "binary"])
def test_a_tasks_spec_grades_rows_as_the_task_does(how):
    task = make_task("knights", people=2, reward=how)
    problems = task.problems("train", 0, 3)
    said = [t for p in problems for t in (task.worked(p), task.worked(p)[:-30], "")]
    rows = [p for p in problems for _ in range(3)]
    columns = {k: [p.extra[k] for p in rows] for k in rows[0].extra}
    grade = spec_reward(task.reward_spec())
    wanted = [task.grade(p, text).value for p, text in zip(rows, said, strict=True)]
    assert grade([p.prompt for p in rows], said, **columns) == wanted
    grade = spec_reward(task.reward_spec(), problem=lambda row: rows[row.extra["index"]])
    assert grade([p.prompt for p in rows], said, index=list(range(9))) == wanted
    seen = []
    grade = spec_reward(task.reward_spec(), problem=lambda row: seen.append(row) or rows[0])
    grade(["told: x"], said[:1], plain_prompt=["x"], level=[2])
    assert seen[0].prompt == "x" and seen[0].extra == {"level": 2}


def test_wrong_arguments_are_refused_by_name(tmp_path):
    for knobs, message in (
        ({"variant": "suboptimal"}, "^variant: expected one of full, score, correctness_only, adv"),
        ({"text": "long"}, "^text: expected one of words, short, got 'long'"),
        ({"motivated": 1.5}, "^motivated: expected a share from 0 to 1, got 1.5"),
        ({"motivated_end": -0.1}, "^motivated_end: expected a share"),
        ({"text": "short"}, "reward spec: part 'length': 'it is short' has no short form"),
        ({"spec": "be right"}, "^spec: expected a RewardSpec, got str"),
    ):
        with pytest.raises(InputError, match=message):
            Motivation(**{"spec": SPEC, **knobs})
    told = Motivation(spec=SPEC)
    data = Dataset.from_list(TEXTS)
    with pytest.raises(InputError, match="it has been told already"):
        told.map(told.map(data))
    with pytest.raises(ValueError, match=r"expected one split to train on, got several \(a, b\)"):
        told.map(DatasetDict({"a": data, "b": data}))
    with pytest.raises(ValueError, match="motivated_end: a share that moves needs GRPOTrainer"):
        Motivation(spec=SPEC, motivated_end=0.0).map(data)
    with pytest.raises(ValueError, match="motivation: expected a Motivation, got str"):
        trainer(tmp_path, motivation="be right")
    with pytest.raises(ValueError, match="spec: expected a RewardSpec, got str"):
        spec_reward("be right")
    with pytest.raises(InputError, match="prompt: expected a message, got an empty list"):
        told.row({"prompt": []})
