"""The words of Knights and Knaves: names, ways to say something, and the prompt of a puzzle."""

from __future__ import annotations

from collections.abc import Sequence

from reasonrl.tasks.base import Draws
from reasonrl.tasks.knights_logic import Statement, wording

NAMES = (
    *("Ada", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas"),
    *("Karl", "Lucy", "Mona", "Nils", "Olga", "Peter", "Quentin", "Rosa", "Stefan", "Tilda"),
    *("Ulrich", "Vera", "Walter", "Xenia", "Yusuf", "Zelda"),
)
OTHER_NAMES = (
    *("Amir", "Bianca", "Chen", "Dorothy", "Emeka", "Fatima", "Goran", "Hanna", "Idris", "Juno"),
    *("Kofi", "Leila", "Marek", "Nadia", "Oscar", "Priya", "Rahul", "Svenja", "Tomoko", "Zuri"),
)
SAYINGS = (
    '{name} says: "{claim}."',
    "{name} says that {claim}.",
    "{name} claims that {claim}.",
    'According to {name}, "{claim}."',
    '"{claim}," {name} tells you.',
    "{name} states that {claim}.",
    '{name} remarks: "{claim}."',
    "You hear from {name} that {claim}.",
)
TRUTHFUL = "Knights always tell the truth and knaves always lie."
FLIPPED = "On this island knights always lie and knaves always tell the truth."
TASK = (
    "Everyone is either a knight or a knave. Who is what? Think between <think> and </think>, then "
    "give each role between <answer> and </answer>, one a line, in this form:"
)


def listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def prompt_text(
    names: Sequence[str], statements: Sequence[Statement], draws: Draws, flipped: bool
) -> str:
    """The puzzle as a user's message; the draws choose how each person says it."""
    roles = ("knave", "knight") if flipped else ("knight", "knave")
    said = []
    for name, statement in zip(names, statements, strict=True):
        claim = wording(statement, names, *roles)
        saying = draws.choice(SAYINGS)
        if saying.startswith('"') or ': "' in saying or ', "' in saying:
            claim = claim[:1].upper() + claim[1:]
        said.append(saying.format(name=name, claim=claim))
    opening = f"{FLIPPED if flipped else TRUTHFUL} You meet {listed(names)}."
    form = f"(1) {names[0]} is a knight (or: a knave)"
    return f"{opening}\n" + "\n".join(said) + f"\n{TASK}\n{form}"
