"""What hybrids lose first: finding again what stood in the context. Made from a seed; no data are needed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from minipuzzle.abilities.items import SCORERS, Item, Sampling, Task
from minipuzzle.data.documents import read_documents
from minipuzzle.errors import MinipuzzleError

_SOME_WORDS = (
    "river stone cloud garden letter window silver market winter bridge music paper forest island table house color "
    "number field battle captain ship summer nation peace money labor public school law court state union treaty army "
    "navy council road tower horse bread water metal glass paint story night morning north south east west engine "
    "wheel brother sister teacher doctor king queen city village farm corn wheat cotton coal iron gold"
)
WORDS = tuple(_SOME_WORDS.split())
_PLACES = ("London", "Paris", "Rome", "Boston", "Cairo", "Madrid", "Vienna", "Lisbon", "Athens", "Berlin")
_NUM_OPTIONS = 4
_CUE_WORDS, _NEXT_WORDS = 2, 4
_MIN_SEEN_WORDS = 24  # before a word that is to be recalled
_WINDOW_WORDS = 64


def _each_length(task: str, sampling: Sampling, make: Callable[[random.Random, int], Item]) -> list[Item]:
    """As many items at every length; adding a length leaves the others' items as they are."""
    items = []
    for length in sampling.context_words:
        for number in range(sampling.num_items):
            rng = random.Random(f"{sampling.seed}/{task}/{length}/{number}")
            item = make(rng, length)
            items.append(Item(**{**vars(item), "name": f"{length}-{number}", "group": f"{length} words"}))
    return items


def _random_words(rng: random.Random, number: int) -> list[str]:
    """Words of which none follows itself; without repetition where there are enough."""
    if number <= len(WORDS):
        return rng.sample(WORDS, number)
    found = [rng.choice(WORDS)]
    while len(found) < number:
        found.append(rng.choice([word for word in WORDS if word != found[-1]]))
    return found


def _copying(rng: random.Random, length: int) -> Item:
    words = _random_words(rng, max(length, _CUE_WORDS + _NEXT_WORDS))
    cue, rest = words[:_CUE_WORDS], words[_CUE_WORDS : _CUE_WORDS + 2 * _NEXT_WORDS]
    options = [" " + " ".join(rest)]
    while len(options) < _NUM_OPTIONS:
        other = " " + " ".join(rng.sample(rest, len(rest)))
        if other not in options:
            options.append(other)
    return Item(name="", prompt=f"{' '.join(words)}.\n{' '.join(cue)}", options=tuple(options))


def _induction(rng: random.Random, length: int) -> Item:
    stretch = _CUE_WORDS + _NEXT_WORDS
    words = _random_words(rng, max(length, _NUM_OPTIONS * stretch))
    starts = rng.sample(range(len(words) // stretch), _NUM_OPTIONS)
    stretches = [words[start * stretch : (start + 1) * stretch] for start in starts]
    options = tuple(dict.fromkeys(" " + " ".join(part[_CUE_WORDS:]) for part in stretches))
    return Item(name="", prompt=f"{' '.join(words)} {' '.join(stretches[0][:_CUE_WORDS])}", options=options)


def _needle(rng: random.Random, length: int) -> Item:
    place, number = rng.choice(_PLACES), rng.randrange(1000, 10_000)
    sentences, num_words = [], 0
    while num_words < length:
        one, two, three = rng.sample(WORDS, 3)
        sentences.append(f"The {one} by the {two} was near the {three}.")
        num_words += len(sentences[-1].split())
    sentences.insert(rng.randrange(len(sentences) + 1), f"The secret number of {place} is {number}.")
    prompt = f"{' '.join(sentences)}\nThe secret number of {place} is"
    return Item(name="", prompt=prompt, reference=str(number), max_tokens=10)


def _recall(sampling: Sampling) -> list[Item]:
    """From the user's own text: which of four words that occurred before comes next, where one of them does."""
    assert sampling.data is not None
    documents = read_documents([sampling.data])
    rng = random.Random(f"{sampling.seed}/recall")
    places = []
    for document_idx, document in enumerate(documents):
        words = list(re.finditer(r"[^\W\d_][\w-]{3,}", document))
        for idx in range(_MIN_SEEN_WORDS, len(words)):
            before = words[max(0, idx - _WINDOW_WORDS) : idx]
            word, start = words[idx].group(), words[idx].start()
            if document[start - 1] == " " and word in {found.group() for found in before}:
                places.append((document_idx, before[0].start(), start, word))
    rng.shuffle(places)
    items: list[Item] = []
    for document_idx, first, start, word in places:
        prompt = documents[document_idx][first : start - 1]
        others = sorted({found for found in re.findall(r"[^\W\d_][\w-]{3,}", prompt) if found != word})
        if len(others) >= _NUM_OPTIONS - 1 and len(items) < sampling.num_items:
            options = (f" {word}", *(f" {other}" for other in rng.sample(others, _NUM_OPTIONS - 1)))
            items.append(Item(name=f"{document_idx}-{start}", prompt=prompt, options=options))
    if not items:
        raise MinipuzzleError(f"{sampling.data} holds no word that comes again", "give longer text")
    return items


COPYING = Task(
    description="a passage of random words begins again: its order, or one of three others",
    items=lambda sampling: _each_length("copying", sampling, _copying),
)
INDUCTION = Task(
    description="two words of a list come again: what followed them, or what followed others",
    items=lambda sampling: _each_length("induction", sampling, _induction),
)
NEEDLE = Task(
    description="a number named once in a text is asked for at its end",
    items=lambda sampling: _each_length("needle", sampling, _needle),
    score=SCORERS["begins"],
)
RECALL = Task(
    description="which of four words of the context comes next, in text of yours",
    items=_recall,
    needs_data=True,
)
