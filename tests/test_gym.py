"""reasoning-gym as a task, against a stand-in with the calls of its 0.1.25."""

import importlib
import sys
import types

import pytest

from reasonrl.records import InputError
from reasonrl.tasks import make_task


def test_gym_problems_are_positions_too(monkeypatch):
    class Dataset:
        def __init__(self, seed, size, top=9):
            self.seed, self.top = seed, top

        def __getitem__(self, index):
            a, b = self.seed % 97, self.seed // 97 % 89
            return {"question": f"{a}+{b}?", "answer": str(a + b), "metadata": {"a": a}}

        def score_answer(self, answer, entry):
            return 1.0 if answer == entry["answer"] else 0.01

    def create(name, **options):
        if name != "sums":
            raise ValueError(f"Dataset {name} not registered")
        return Dataset(**options)

    fake = types.SimpleNamespace(create_dataset=create)
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    task = make_task("gym", dataset="sums", options={"top": 5})
    held = task.problems("test", 0, 50)
    assert len({str(p.prompt) for p in held}) == 50 and task.problem("test", 49) == held[49]
    assert not {str(p.prompt) for p in held} & {
        str(p.prompt) for p in task.problems("train", 0, 200)
    }
    assert task.grade(held[0], f"<answer>{held[0].answer}</answer>").value == 1.0
    assert task.grade(held[0], "<answer>x</answer>").value == 0.01
    assert task.grade(held[0], "x").value == 0.0
    with pytest.raises(InputError, match="dataset 'nope': Dataset nope not registered"):
        make_task("gym", dataset="nope")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="reasoning-gym is not installed"):
        make_task("gym")


@pytest.mark.parametrize(
    "call, refused",
    [("eval(answer) == 1", "eval"), ("sympy.parse_expr(answer)", "parse_expr"), ("1", None)],
)
def test_scorers_that_evaluate_model_text_are_refused(monkeypatch, tmp_path, call, refused):
    name = f"scorer_{refused}"
    (tmp_path / f"{name}.py").write_text(
        "class Dataset:\n"
        "    def __init__(self, seed, size): ...\n"
        f"    def score_answer(self, answer, entry): return {call}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    fake = types.SimpleNamespace(create_dataset=lambda _, **options: module.Dataset(**options))
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    if refused is None:
        make_task("gym")
        return
    with pytest.raises(InputError, match=rf"evaluate model text as code \({refused} in {name}\)"):
        make_task("gym")
