"""TRL's trainer on the smallest model there is, for the tests of its adapter."""

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

from reasonrl import tiny
from reasonrl.integrations.trl import GRPOTrainer
from reasonrl.tasks import make_task

TASK = make_task("arithmetic", style="compact", terms=2, ops="+", mod=5, low=0)

ROWS = [{"prompt": TASK.problem("train", i).prompt, "problem": i} for i in range(200)]
OURS = "scorer fused reward_funcs thinking trust motivation train_dataset eval_dataset".split()


def right(completions, problem, **_):
    """The task's own grade as a TRL reward function."""
    problems = [TASK.problem("train", int(n)) for n in problem]
    return [TASK.grade(p, c).value for p, c in zip(problems, completions, strict=True)]


def trainer(folder, kind=GRPOTrainer, model=None, **options):
    extra = {k: options.pop(k) for k in OURS if k in options}
    model, tokenizer = model or tiny.build(seed=0, width=32, layers=1, heads=2)
    tokenizer.padding_side = "left"
    if options.get("beta"):  # TRL loads its reference from where the model came from
        model.save_pretrained(folder / "model")
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 10,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "output_dir": str(folder),
    }
    rows = extra.pop("train_dataset", None) or Dataset.from_list(ROWS)
    settings["use_bias_correction_kl"] = False  # TRL's default, True, has no fused path
    config = trl.GRPOConfig(**(settings | options))
    made = kind(
        model=model,
        processing_class=tokenizer,
        reward_funcs=extra.pop("reward_funcs", right),
        args=config,
        train_dataset=rows,
        **extra,
    )
    made.current_gradient_accumulation_steps = config.gradient_accumulation_steps  # its loop's
    return made
