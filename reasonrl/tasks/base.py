"""What a task is: problems by (seed, split, index), a grade, and steps that a rule can check.

A position in a task is three integers, so a resumed run draws exactly what an unbroken run draws.
Which split a problem belongs to is decided by a hash of its content alone, never by the seed or
the knobs: "dev" and "test" share nothing with each other nor with "train", whatever the runs were.
"sft" (the cold start) and "train" share one pool. All randomness is `Draws`, integers only, the
same on every machine and every Python.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from reasonrl.answer import ballot
from reasonrl.answer_forms import surely_differ
from reasonrl.records import InputError, Problem, Score, Step
from reasonrl.reward_spec import RewardSpec
from reasonrl.segment import think_span

Split = Literal["sft", "train", "dev", "test"]
SPLITS: tuple[str, ...] = ("sft", "train", "dev", "test")
MASK64 = (1 << 64) - 1
PATIENCE = 4000  # draws in a row without a new problem before a split is called exhausted


class Draws:
    """A stream of integers fixed by its key (splitmix64, seeded by BLAKE2b of the key)."""

    def __init__(self, *key: object):
        digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
        self.state = int.from_bytes(digest, "little")

    def next64(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK64
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """A uniform integer in [0, n), without modulo bias."""
        limit = (MASK64 + 1) - (MASK64 + 1) % n
        while True:
            value = self.next64()
            if value < limit:
                return value % n

    def between(self, low: int, high: int) -> int:
        """A uniform integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence):
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence) -> list:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out


def content_share(content: str) -> float:
    """Where a content falls in [0, 1): a hash of the text, the same for ever."""
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def split_of(content: str, dev: float = 0.1, test: float = 0.2) -> str:
    """The split of a content: test, dev or train; `dev` and `test` are shares of all contents."""
    share = content_share(content)
    if share < test:
        return "test"
    return "dev" if share < test + dev else "train"


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")


@dataclass(frozen=True)
class Task:
    """Problems and how they are graded. The knobs are the fields of the subclass."""

    seed: int = 0
    name: ClassVar[str] = "task"

    @property
    def delimiter(self) -> str:
        """What ends a step of a completion, where a model and not a rule cuts it."""
        return "\n"

    @property
    def alphabet(self) -> str:
        """Every character that prompts and worked completions use (for character-level models)."""
        return "\n" + "".join(map(chr, range(32, 127)))

    def problem(self, split: str, index: int) -> Problem:
        """Problem number `index` of a split; fixed by (seed, split, index) and the knobs."""
        raise NotImplementedError

    def problems(self, split: str, start: int, count: int) -> list[Problem]:
        """Problems start .. start + count - 1; in "dev" and "test" no two are the same."""
        return [self.problem(split, start + i) for i in range(count)]

    def worked(self, problem: Problem) -> str | None:
        """A gold completion for the cold start, or None."""
        return None

    def check(self, problem: Problem, response: str) -> str | None:
        """A gold judgement of a response up to its verdict, for a judge's cold start: the answer
        re-derived, then what the response states. None where there is no worked answer."""
        worked = self.worked(problem)
        stated = ballot(response) or "nothing"
        return None if worked is None else f"{worked}\nThe response states {stated}."

    def grade(self, problem: Problem, completion: str) -> Score:
        """The outcome of one completion."""
        raise NotImplementedError

    def grades(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        """The outcomes of many completions, `problems` one for each."""
        return [self.grade(p, c) for p, c in zip(problems, completions, strict=True)]

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        """What evaluation counts: 1 for right, 0 for wrong; the grades, unless a reward of another
        scale is trained on."""
        return self.grades(problems, completions)

    def canary(self, problem: Problem, other: Problem) -> Problem | None:
        """`other` as a problem that nothing right for `problem` can answer; None where that is not
        certain."""
        apart = surely_differ(problem.answer, other.answer, other.answer_type)
        return other if apart else None

    def steps(self, problem: Problem, completion: str) -> list[Step] | None:
        """Steps with reward 1.0 or 0.0 by rule, as character spans; None where no rule can tell."""
        return None

    def review(self, problem: Problem, completion: str) -> str | None:
        """A gold working of who scores a thinking: every step put right, marked + where it was and
        - where not, and a ? for each that is missing; None where no rule can tell."""
        return None

    def thinking(self, problem: Problem, completion: str) -> str:
        """The reasoning of a completion, without its answer; empty where there is none."""
        span = think_span(completion)
        return "" if span is None else completion[slice(*span)].strip()

    def reward_spec(self) -> RewardSpec | None:
        """The outcome as an object that also states it in words; None where nobody wrote it."""
        return None

    def prefix_correct(self, problem: Problem, completion: str) -> float | None:
        """Share of the expected steps before the first wrong one; None without rules."""
        return None


def parts_of(text: str) -> list[Step]:
    """The parts of a completion of single characters: behind every `;`, and from a `#` on."""
    cuts = {0, len(text), *(m.end() for m in re.finditer(";+", text))}
    cuts |= {m.start() for m in re.finditer("#", text)}
    edges = sorted(cuts)
    return [Step(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def leading_share(steps: Sequence[Step], expected: int) -> float:
    """Length of the leading run of steps with reward 1, over the number of steps expected."""
    right = 0
    for step in steps:
        if step.reward != 1.0:
            break
        right += 1
    return min(right, expected) / expected


@dataclass(frozen=True)
class GeneratedTask(Task):
    """A task without a data file: a subclass says how one candidate is drawn.

    "dev" and "test" number the distinct problems of their split in the order in which the stream
    meets them; asking for more than there are is an InputError that says how many exist.
    """

    _found: dict[str, dict[str, Problem]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _position: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def candidate(self, draws: Draws, id: str) -> tuple[str, Problem]:
        """One (content, problem); the content alone decides the split."""
        raise NotImplementedError

    def _draw(self, split: str, index: int, id: str) -> tuple[str, Problem]:
        draws = Draws(self.name, self.seed, split, index)
        pool = "train" if split == "sft" else split
        for _ in range(PATIENCE):
            content, problem = self.candidate(draws, id)
            if split_of(content) == pool:
                return content, problem
        raise InputError(f"task {self.name}: no problem of split {split!r} with these options")

    def _fill(self, split: str, count: int) -> list[Problem]:
        found = self._found.setdefault(split, {})
        position = self._position.get(split, 0)
        misses = 0
        while len(found) < count:
            id = f"{self.name}-{self.seed}-{split}-{len(found)}"
            content, problem = self._draw(split, position, id)
            position += 1
            misses = misses + 1 if content in found else 0
            found.setdefault(content, problem)
            if misses > max(PATIENCE, 20 * len(found)):
                raise InputError(
                    f"task {self.name}: {count} distinct {split} problems asked for, "
                    f"{len(found)} exist with these options"
                )
        self._position[split] = position
        return list(found.values())

    def problem(self, split: str, index: int) -> Problem:
        check_split(split)
        if index < 0:
            raise InputError(f"task {self.name}: index must be >= 0, got {index}")
        if split in ("dev", "test"):
            return self._fill(split, index + 1)[index]
        return self._draw(split, index, f"{self.name}-{self.seed}-{split}-{index}")[1]

    def problems(self, split: str, start: int, count: int) -> list[Problem]:
        check_split(split)
        if split in ("dev", "test"):
            if start < 0 or count < 0:
                raise InputError(f"task {self.name}: start and count must be >= 0")
            return self._fill(split, start + count)[start : start + count]
        return [self.problem(split, start + i) for i in range(count)]
