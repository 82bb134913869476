"""Questions about scenes and their exact answers."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from lvlm.calibration.datasets.scenes.drawing import COLOURS, NAMES, PLACES, ROWS, Scene, Thing
from lvlm.calibration.datasets.scenes.glyphs import WORDS

# In the order in which they may be dropped from the end if training does not reach them
Kind = Literal["read", "row", "list", "colour", "where", "count", "describe", "pictures", "turns"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ORDINALS = ("first", "second")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Turn = tuple[str, str]  # a question and its answer


def ask(scenes: tuple[Scene, ...], kind: Kind, rng: np.random.Generator) -> list[Turn]:
    """A question of a kind about the images of a prompt; of kind ``turns`` two, else one."""
    if kind == "pictures":
        return [_of_two(scenes, rng)]
    scene = scenes[0]
    if kind == "turns":
        return _two_turns(scene, rng)
    return [_ONE[kind](scene, rng)]


def said(thing: Thing | None) -> str:
    """A thing's name: words are read in lower case."""
    return "nothing" if thing is None else _word(thing.name)


def _word(name: str) -> str:
    return name.lower() if name in WORDS else name


def _the(name: str) -> str:
    return f"the word {name.lower()}" if name in WORDS else f"the {name}"


def _a(thing: Thing) -> str:
    if thing.name in WORDS:
        return f"the word {said(thing)} in {thing.colour}"
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {said(thing)}"


def _place(scene: Scene, rng: np.random.Generator) -> int:
    """Mostly where something is."""
    if rng.random() < 0.85:
        return scene.things[int(rng.integers(len(scene.things)))].place
    return int(rng.integers(9))


def _read(scene: Scene, rng: np.random.Generator) -> Turn:
    place = _place(scene, rng)
    return f"What is at the {PLACES[place]}?", said(scene.at(place))


def _row(scene: Scene, rng: np.random.Generator) -> Turn:
    row = int(rng.integers(3))
    names = [said(scene.at(3 * row + column)) for column in range(3)]
    return f"Read the {ROWS[row]} row.", ", ".join(names)


def _list(scene: Scene, rng: np.random.Generator) -> Turn:  # noqa: ARG001
    return "Read everything.", ", ".join(said(t) for t in scene.things)


def _colour(scene: Scene, rng: np.random.Generator) -> Turn:
    unique = scene.unique()
    if unique and rng.random() < 0.5:
        thing = unique[int(rng.integers(len(unique)))]
        return f"Which colour is {_the(thing.name)}?", thing.colour
    thing = scene.things[int(rng.integers(len(scene.things)))]
    return f"Which colour is the thing at the {PLACES[thing.place]}?", thing.colour


def _where(scene: Scene, rng: np.random.Generator) -> Turn:
    unique = scene.unique()
    if unique and rng.random() < 0.85:
        thing = unique[int(rng.integers(len(unique)))]
        return f"Where is {_the(thing.name)}?", f"at the {PLACES[thing.place]}"
    here = {t.name for t in scene.things}
    name = str(rng.choice([n for n in NAMES if n not in here]))
    return f"Where is {_the(name)}?", "nowhere"


def _count(scene: Scene, rng: np.random.Generator) -> Turn:
    """The answer reads what there is and counts as it goes, so that no step is a leap for a small
    model."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if rng.random() < 0.5:
        colour = thing.colour if rng.random() < 0.85 else str(rng.choice(list(COLOURS)))
        question = f"How many things are {colour}?"
        parts = [(t.colour, t.colour == colour) for t in scene.things]
    else:
        name = thing.name if rng.random() < 0.85 else str(rng.choice(NAMES))
        question = f"How often does {_the(name)} appear?"
        parts = [(said(t), t.name == name) for t in scene.things]
    steps, count = [], 0
    for text, counts in parts:
        count += counts
        steps.append(f"{text} ({count})" if counts else text)
    return question, f"{', '.join(steps)}. In all {count}."


def _describe(scene: Scene, rng: np.random.Generator) -> Turn:  # noqa: ARG001
    number = len(scene.things)
    things = "thing" if number == 1 else "things"
    lines = " ".join(f"At the {PLACES[t.place]} is {_a(t)}." for t in scene.things)
    rest = "There is nothing else: all the rest is empty." if number < 9 else "No place is empty."
    answer = (
        f"The picture shows {NUMBERS[number]} {things} on a dark canvas. {lines} {rest} "
        f"That makes {NUMBERS[number]} in all."
    )
    return "Describe the picture.", answer


def _of_two(scenes: tuple[Scene, ...], rng: np.random.Generator) -> Turn:
    which = int(rng.integers(2))
    scene, other = scenes[which], scenes[1 - which]
    elsewhere = {t.name for t in other.things}
    unique = [t for t in scene.unique() if t.name not in elsewhere]
    form = int(rng.integers(3))
    if form == 0 and unique:
        thing = unique[int(rng.integers(len(unique)))]
        return f"Which picture shows {_the(thing.name)}?", f"the {ORDINALS[which]}"
    if form == 1 and scene.unique():
        thing = scene.unique()[int(rng.integers(len(scene.unique())))]
        question = f"Where is {_the(thing.name)} in the {ORDINALS[which]} picture?"
        return question, f"at the {PLACES[thing.place]}"
    place = _place(scene, rng)
    question = f"What is at the {PLACES[place]} of the {ORDINALS[which]} picture?"
    return question, said(scene.at(place))


def _two_turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """The second question means what the first was about, or asks for something else."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    first = (f"What is at the {PLACES[thing.place]}?", said(thing))
    form = int(rng.integers(3))
    if form == 0:
        return [first, ("Which colour is it?", thing.colour)]
    unique = scene.unique()
    if form == 1 and unique:
        thing = unique[int(rng.integers(len(unique)))]
        where = f"Where is {_the(thing.name)}?", f"at the {PLACES[thing.place]}"
        return [where, ("Which colour is it?", thing.colour)]
    return [first, _read(scene, rng) if rng.random() < 0.5 else _colour(scene, rng)]


_ONE = {
    "read": _read,
    "row": _row,
    "list": _list,
    "colour": _colour,
    "where": _where,
    "count": _count,
    "describe": _describe,
}
