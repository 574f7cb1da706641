"""The config: typed values from YAML and overrides, one line for every mistake."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import config, keys
from reasonrl.config_yaml import read_scalar
from reasonrl.records import InputError

RECIPE = """
model: smollm2
learning_rate: 3e-5
optim: {betas: [0.9, 0.99], schedule: cosine}
task_options: {terms: 4, ops: +-}
loss: {clip_high: 0.28}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "my recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_values_defaults_and_overrides(recipe):
    cfg = config.load(recipe, ["steps=50", "task_options.ops=-", "algo.mode=no", "optim.eps=1e-6"])
    assert (cfg.model, cfg.learning_rate, cfg.steps) == ("smollm2", 3e-5, 50)
    assert cfg.optim.betas == (0.9, 0.99) and cfg.optim.eps == 1e-6
    assert cfg.task_options == {"terms": 4, "ops": "-"} and cfg.algo == {"mode": "no"}
    assert cfg.loss == {"name": "grpo", "clip_high": 0.28}
    assert (cfg.sample.temperature, cfg.sample.top_p, cfg.sample.top_k) == (1.0, 1.0, 0)
    assert config.load(recipe, ["steps=1", "steps=2"]).steps == 2
    assert config.load(recipe, ["loss={name: dapo}"]).loss == {"name": "dapo"}
    assert config.load(recipe, ["threads=3"]).threads == 3
    assert config.load(recipe, ["threads=3", "threads=null"]).threads is None


def test_another_task_model_or_algorithm_leaves_the_options_of_the_old_one(recipe):
    cfg = config.load(recipe, ["task=data.jsonl", "algo.x=1"])
    assert cfg.task_options == {} and cfg.algo == {"x": 1}
    cfg = config.load(recipe, ["task_options.dev=0.3", "task=data.jsonl"])
    assert cfg.task_options == {"dev": 0.3}
    assert config.load(recipe, ["task=arithmetic"]).task_options == {"terms": 4, "ops": "+-"}
    recipe.write_text("algorithm: process\nalgo: {credit: step}\nmodel_options: {width: 8}")
    assert config.load(recipe, ["algorithm=grpo"]).algo == {}
    assert config.load(recipe, ["model=smollm2", "algo.y=2"]).model_options == {}
    assert config.load(recipe, ["model=tiny", "algo.y=2"]).model_options == {"width": 8}
    assert config.load(recipe, ["algo.y=2"]).algo == {"credit": "step", "y": 2}


def test_every_key_of_the_contract_is_accepted(recipe):
    keys = "model=x task=y seed=1 steps=2 cold_start_steps=3 prompts_per_step=4 group=5"
    more = "max_completion_length=6 learning_rate=7 eval_problems=8"
    cfg = config.load(recipe, f"{keys} {more}".split())
    assert cfg.learning_rate == 7.0 and cfg.eval_problems == 8 and cfg.group == 5


@pytest.mark.parametrize(
    "text, value",
    [
        ("3e-5", 3e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-7", -7),
        ("010", 10),
        ("12:30", "12:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
        ("-", "-"),
        ("a: b # c", "a: b # c"),
        ("2026-11-22", "2026-11-22"),
        ("'3'", "3"),
        ("[1, 2e1]", [1, 20.0]),
        ("{a: yes}", {"a": "yes"}),
        ("1_000", "1_000"),
    ],
)
def test_scalars_follow_the_core_schema(text, value):
    got = read_scalar(text, "here")
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("learning_rat=3", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("lr=3", "unknown key 'lr'; did you mean 'learning_rate'?"),
        ("optim.beta=3", "unknown key 'optim.beta'; did you mean 'optim.betas'?"),
        ("sampel.top_p=1", "unknown key 'sampel'; did you mean 'sample'?"),
        ("learning_rate=abc", "learning_rate: expected a number, got 'abc'"),
        ("learning_rate=true", "learning_rate: expected a number, got True"),
        ("learning_rate=0", "learning_rate: expected a number > 0.0, got 0"),
        ("learning_rate=.nan", "learning_rate: expected a finite number, got nan"),
        ("learning_rate=1e999", "learning_rate: expected a finite number, got inf"),
        ("steps=3.0", "steps: expected an integer, got 3.0"),
        ("steps=-1", "steps: expected a number >= 0, got -1"),
        ("steps=", "steps: expected an integer, got None"),
        ("group=0", "group: expected a number >= 1, got 0"),
        ("model=3", "model: expected a string, got 3"),
        ("log.wandb=1", "log.wandb: expected true or false, got 1"),
        ("optim=3", "optim: expected a section of keys, got 3"),
        ("algo=3", "algo: expected a section of keys, got 3"),
        ("seed.x=3", "seed: expected an integer, got {'x': 3}"),
        ("model.x=3", "override 'model.x=3': model is a value, not a section"),
        ("optim.schedule=cos", "expected 'constant', 'linear' or 'cosine', got 'cos'"),
        ("steps", "override 'steps': expected key.path=value"),
        ("=3", "override '=3': expected key.path=value"),
        ("a..b=3", "expected key.path=value"),
        ("optim.betas=[0.9,", "line 1:"),
        ("loss.clip_hihg=0.3", "unknown key 'loss.clip_hihg'; did you mean 'loss.clip_high'?"),
        ("loss.name=ppo", "loss: name must be one of grpo, bnpo"),
        ("loss.clip_high=high", "loss: "),
        ("loss.surrogate=clap", "loss: surrogate"),
    ],
)
def test_every_mistake_is_one_line_naming_the_key(recipe, override, message):
    with pytest.raises(InputError) as caught:
        config.load(recipe, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"steps: 3\nsteps: 4\n", "line 2: key 'steps' stands twice"),
        (b"steps: [", "line 1:"),
        (b"- 1\n- 2\n", "expected keys and values, got list"),
        (b"model: \xff\n", "not UTF-8 (byte 7)"),
        (b"steps: yes\n", "steps: expected an integer, got 'yes'"),
        (b"3: 4\n", "expected keys and values"),
        (b"model: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        config.load(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert config.load(path) == config.Config()


def test_unknown_recipes_name_the_nearest_and_the_known(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "RECIPES", tmp_path)
    for name in ("quickstart", "tiny"):
        (tmp_path / f"{name}.yaml").write_text("steps: 1\n")
    with pytest.raises(
        InputError, match="'quickstar'; did you mean 'quickstart'.*quickstart, tiny"
    ):
        config.load("quickstar")
    with pytest.raises(InputError, match="no such file"):
        config.load(tmp_path / "absent.yaml")
    assert config.load("tiny").steps == 1
    with pytest.raises(InputError, match="recipe tiny: steps: expected an integer, got 'x'"):
        (tmp_path / "tiny.yaml").write_text("steps: x\n")
        config.load("tiny")


def test_a_written_config_reads_back_equal(recipe, tmp_path):
    odd = ["algo.a='3e-5'", "algo.b='no'", "algo.c='010'", "algo.d='null'", "algo.e='é: #'"]
    cfg = config.load(recipe, [*odd, "learning_rate=1e-7", "algo.f=[1, 2.5, x]"])
    path = tmp_path / "config.yaml"
    path.write_text(cfg.to_yaml(), encoding="utf-8")
    again = config.read(path)
    assert again == cfg and again.digest() == cfg.digest()
    assert config.diff(cfg, again) == []
    assert config.load(recipe).digest() != cfg.digest()


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: not keys.NAMED.search(name)),
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
        max_size=4,
    )
)
def test_any_passed_through_value_survives_a_round_trip(tmp_path_factory, values):
    cfg = config.Config(algo=values)
    path = tmp_path_factory.mktemp("c") / "config.yaml"
    path.write_text(cfg.to_yaml(), encoding="utf-8")
    assert config.diff(cfg, config.read(path)) == []


def test_the_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        config.Config().steps = 3


def test_diff_names_dotted_keys(recipe):
    old = config.load(recipe)
    new = config.load(recipe, ["steps=1", "optim.warmup=9", "algo.x=1", "task_options.terms=4.0"])
    assert config.diff(old, new) == ["steps", "task_options.terms", "optim.warmup", "algo.x"]


def test_resume_may_change_steps_evaluation_and_logging_only(recipe):
    old = config.load(recipe)
    free = ["steps=7", "eval_problems=9", "eval.every=3", "log.wandb=true", "save.keep=4"]
    config.check_resume(old, config.load(recipe, free), "runs/a/config.yaml")
    for override in (
        "learning_rate=1e-3",
        "seed=1",
        "threads=2",
        "task_options.terms=5",
        "algo.x=1",
    ):
        key = override.partition("=")[0]
        with pytest.raises(InputError, match=f"runs/a/config.yaml: {key}: the run has"):
            config.check_resume(old, config.load(recipe, [override]), "runs/a/config.yaml")
