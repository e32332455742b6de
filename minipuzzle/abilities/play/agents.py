"""Agents: who chooses a command in a world. Graphs of prompts, PET, and the two references, chance and the oracle."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from minipuzzle.abilities.items import Item, Sampling, Task
from minipuzzle.abilities.play.graph import Ask, Graph, Message
from minipuzzle.abilities.play.graph_files import lines_of, read_graph
from minipuzzle.abilities.play.worlds import AGENTS, WORLDS, World
from minipuzzle.errors import MinipuzzleError

_GRAPHS = Path(__file__).parent
_HISTORY_STEPS = 8  # that prompts show; SPRING's show two
CHANCE, ORACLE = "chance", "the oracle"  # the references, as players
STEPS_OVER_SHORTEST = 3  # an episode ends after so many times the steps of a shortest way
KEPT_THRESHOLD, KEPT_AT_LEAST = 0.4, 2  # of PET's elimination; the paper's threshold is not known to us
_CONTEXT = (
    "You can hold one thing. Closed things must be opened before you see or take what is in them. You see what lies "
    "somewhere when you go there. Things are cleaned at a sinkbasin, heated with a microwave, cooled with a fridge."
)


class Player(Protocol):
    """A model that plays: it answers conversations, and says how likely texts are."""

    def chat(self, messages: Sequence[Message], *, max_tokens: int) -> str:
        """The answer to a conversation."""

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log p(continuation | prompt) of each pair."""


class Agent(Protocol):
    """Chooses commands of one game."""

    def act(self, world: World, history: Sequence[tuple[str, str]]) -> str:
        """The next command, after commands and what they showed."""


class GraphAgent:
    """Runs a graph once a step; the value of its node ``action`` is the command."""

    def __init__(
        self, graph: Graph, model: Player, *, context: str = _CONTEXT, num_steps: int = _HISTORY_STEPS
    ) -> None:
        self._graph, self._model, self._num_steps = graph, model, num_steps
        self._store: dict[str, Any] = {"context": context}

    def act(self, world: World, history: Sequence[tuple[str, str]]) -> str:
        """One pass over the graph; the store lives as long as the game."""
        self._store |= seen_of(world, history, self._num_steps)
        passed = self._graph.run(lambda messages, tokens: self._model.chat(messages, max_tokens=tokens), self._store)
        return str(passed.values["action"])


def seen_of(world: World, history: Sequence[tuple[str, str]], num_steps: int = _HISTORY_STEPS) -> dict[str, Any]:
    """What prompts take of a world."""
    shown = [f"> {action}\n{observation}" for action, observation in history[-num_steps:]]
    return {
        "goal": world.goal,
        "history": "\n".join(shown) or "(nothing yet)",
        "observation": world.observation,
        "actions": world.actions,
    }


class PetAgent:
    """Plan, Eliminate, Track (2305.02412): a plan of subtasks in writing; what matters to the current one, and whether
    it is done, by the probability of yes; the command by likelihood among those about things that matter."""

    def __init__(self, model: Player, *, threshold: float = KEPT_THRESHOLD) -> None:
        self._model, self._threshold = model, threshold
        self.subtasks: list[str] = []
        self._current = 0

    def act(self, world: World, history: Sequence[tuple[str, str]]) -> str:
        """Move on in the plan if the last step finished its subtask, then choose."""
        if not self.subtasks:
            question = f"A task in a household: {world.goal}\nList the subtasks that do it, one a line, and no more."
            answer = self._model.chat([{"role": "user", "content": question}], max_tokens=128)
            self.subtasks = lines_of(answer) or [world.goal]
        seen = seen_of(world, history)
        while history and self._current < len(self.subtasks) - 1:
            done = f"{_situation(seen)}\nQuestion: Is this done: {self.subtasks[self._current]}?\nAnswer:"
            if self._yes([done])[0] <= 0.5:
                break
            self._current += 1
        return self._choose(world, seen)

    def _choose(self, world: World, seen: dict[str, Any]) -> str:
        subtask = self.subtasks[self._current]
        things = sorted({thing for action in world.actions for thing in things_of(action)})
        asked = [f"Subtask: {subtask}\nQuestion: Does a {thing} matter for it?\nAnswer:" for thing in things]
        chances = dict(zip(things, self._yes(asked), strict=True))
        most = sorted(things, key=lambda thing: -chances[thing])[:KEPT_AT_LEAST]
        kept = {thing for thing in things if chances[thing] >= self._threshold} | set(most)
        actions = [action for action in world.actions if set(things_of(action)) <= kept]
        prompt = f"{_situation(seen)}\nSubtask: {subtask}\nNext command:"
        likelihoods = self._model.log_likelihoods([(prompt, f" {action}") for action in actions])
        return actions[likelihoods.index(max(likelihoods))]

    def _yes(self, questions: Sequence[str]) -> list[float]:
        """P(yes) of yes and no."""
        pairs = [(question, answer) for question in questions for answer in (" yes", " no")]
        values = self._model.log_likelihoods(pairs)
        gaps = (no - yes for yes, no in zip(values[::2], values[1::2], strict=True))
        return [1 / (1 + math.exp(min(gap, 700.0))) for gap in gaps]


def _situation(seen: dict[str, Any]) -> str:
    return f"Task: {seen['goal']}\n{seen['history']}\nNow: {seen['observation']}"


def things_of(action: str) -> list[str]:
    """The things that a command names: words with a number."""
    return re.findall(r"[a-z]+ \d+", action)


class RandomAgent:
    """Any command, by a seed: what a model must beat."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)

    def act(self, world: World, history: Sequence[tuple[str, str]]) -> str:
        """One of those there are."""
        return self._rng.choice(world.actions)


class OracleAgent:
    """Sees everything: what there is to reach."""

    def act(self, world: World, history: Sequence[tuple[str, str]]) -> str:
        """The first command of a shortest way."""
        return world.oracle_action()


def _of_graph(path: Path, num_steps: int = _HISTORY_STEPS) -> Callable[[Player], Agent]:
    return lambda model: GraphAgent(read_graph(path), model, num_steps=num_steps)


DIRECT, AGENTKIT = _of_graph(_GRAPHS / "direct.toml"), _of_graph(_GRAPHS / "agentkit.toml")
SPRING = _of_graph(_GRAPHS / "spring.toml", num_steps=2)


def play(agent: Agent, world: World, max_steps: int) -> list[tuple[str, str]]:
    """Commands and what they showed, until the goal is reached or the steps are used up."""
    history: list[tuple[str, str]] = []
    while not world.is_done and len(history) < max_steps:
        action = agent.act(world, tuple(history))
        world.step(action)
        history.append((action, world.observation))
    return history


def world_task(world: str, agent: str) -> Task:
    """Games of a world as a task: won or not, with every command in the answer.

    Raises: MinipuzzleError for an unknown world or agent, or a graph of the user's that is none.
    """
    make = WORLDS[world]
    if agent.endswith(".toml"):
        read_graph(Path(agent))  # refused now, not after other models played
        of_model: Callable[[Player], Agent] = _of_graph(Path(agent))
    else:
        of_model = AGENTS[agent]

    def play_item(model: Any, item: Item) -> tuple[float, str]:
        game = make(int(item.facts["seed"]))
        player: Agent
        if isinstance(model, str):
            player = RandomAgent(item.name) if model == CHANCE else OracleAgent()
        else:
            player = of_model(model)
        history = play(player, game, int(item.facts["steps"]))
        return float(game.is_done), json.dumps(history)

    return Task(description=f"games of {world}", items=partial(_games, world), play=play_item)


def _games(world: str, sampling: Sampling) -> list[Item]:
    items = []
    for number in range(sampling.num_items):
        seed = sampling.seed * 10**6 + number
        game = WORLDS[world](seed)
        steps = STEPS_OVER_SHORTEST * len(play(OracleAgent(), WORLDS[world](seed), 1000))
        facts = {"seed": str(seed), "steps": str(steps)}
        items.append(Item(name=str(seed), prompt=f"{game.goal}\n{game.observation}", facts=facts))
    return items


def recorded_decisions(world: str, sampling: Sampling) -> list[Item]:
    """States on the oracle's way, as choices between all commands, of which the oracle's is right.

    Both models see the same states, wherever their own play would have led: there is signal at any size of model.
    """
    items = []
    for number in range(sampling.num_items):
        rng = random.Random(f"{sampling.seed}/{world}/{number}")
        game = WORLDS[world](sampling.seed * 10**6 + number)
        history = play(OracleAgent(), WORLDS[world](sampling.seed * 10**6 + number), 1000)
        stop = rng.randrange(len(history))
        for action, _ in history[:stop]:
            game.step(action)
        seen = seen_of(game, history[:stop])
        options = [history[stop][0], *(action for action in game.actions if action != history[stop][0])]
        prompt = f"{_situation(seen)}\nNext command:"
        items.append(Item(name=str(number), prompt=prompt, options=tuple(f" {action}" for action in options)))
    return items


HOUSEHOLD = Task(
    description="the next command in a household, on states of the oracle's games",
    items=partial(recorded_decisions, "household"),
)


def spring_context(ask: Ask, source: str, *, about: str) -> str:
    """What a paper's LaTeX says of a game, as SPRING (2305.15486) takes it out, for the store's ``context``.

    Paragraphs are kept if either of two questions on relevance is answered yes; four questions are put to each of
    those; the answers to each question are freed of repetitions by one more.
    """

    def asked(question: str) -> str:
        return ask([{"role": "user", "content": question}], 256)

    kept = [
        text
        for text in paragraphs_of(source)
        if any(
            asked(f"{text}\n\n{one.format(about=about)} Answer yes or no.").casefold().startswith("yes")
            for one in _ASKS
        )
    ]
    if not kept:
        raise MinipuzzleError(f"no paragraph of the source is about {about}", "give the paper's LaTeX")
    answers = []
    for question in _EXTRACTS:
        found = [asked(f"{text}\n\n{question}") for text in kept]
        answers.append(f"{question}\n{asked('Write this without repetitions: ' + ' '.join(found))}")
    return "\n".join(answers)


_ASKS = ("Would this help somebody to succeed in {about}?", "Does this say what the rules of {about} are?")
_EXTRACTS = (
    "Write all that helps to succeed.",
    "Name the things to use or to avoid.",
    "Name the aims, and what each of them requires.",
    "Name the commands, and what each of them requires.",
)


def paragraphs_of(source: str) -> Iterable[str]:
    """Paragraphs of the body of a LaTeX file, without its comments."""
    body = source.partition(r"\begin{document}")[2] or source
    body = re.sub(r"(?<!\\)%.*", "", body.partition(r"\end{document}")[0])
    return [text.strip() for text in re.split(r"\n\s*\n", body) if re.search(r"[A-Za-z]{3}", text)]
