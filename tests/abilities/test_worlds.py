"""Guarantee: the household is the same everywhere and its plans are shortest; agents that are told the truth win every
game; chance and the oracle stand beside every model."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.abilities.items import Sampling
from minipuzzle.abilities.play.agents import (
    GraphAgent,
    OracleAgent,
    PetAgent,
    RandomAgent,
    paragraphs_of,
    play,
    recorded_decisions,
    seen_of,
    spring_context,
)
from minipuzzle.abilities.play.graph_files import read_graph
from minipuzzle.abilities.play.household import KINDS_OF_TASK, Household
from minipuzzle.abilities.play.worlds import AGENTS
from tests.support.cli import run_cli, run_json
from tests.support.packages import run_python

GAMES = range(2 * len(KINDS_OF_TASK))


@pytest.mark.parametrize("seed", range(0, 36, 5))
def test_the_oracle_wins_in_the_steps_it_plans(seed: int) -> None:
    game = Household(seed)
    plan = game.plan()
    assert not game.is_done and game.task.kind == KINDS_OF_TASK[seed % 6]
    for idx, action in enumerate(plan):
        assert action in game.actions and game.plan() == plan[idx:]
        game.step(action)
        assert game.observation != "Nothing happens."
    assert game.is_done


@pytest.mark.parametrize("seed", [0, 5, 8, 29])
def test_no_way_is_shorter_than_the_plan(seed: int) -> None:
    """All commands, from all states that are reached, one step fewer than the plan has."""
    game = Household(seed)
    plan = game.plan()
    states, known = [game.state], {game.state}
    for _ in range(len(plan) - 1):
        reached = []
        for state in states:
            game.state = state
            for action in game.actions:
                game.state = state
                game.step(action)
                if game.state not in known:
                    assert not game.is_done
                    known.add(game.state)
                    reached.append(game.state)
        states = reached
    assert len(known) > 100


def test_games_are_the_same_in_every_process() -> None:
    code = (
        "import json; from minipuzzle.abilities.play.agents import *;"
        "from minipuzzle.abilities.play.household import *;"
        "print(json.dumps([play(RandomAgent('x'), Household(seed), 30) for seed in (1, 4)]))"
    )
    here = [[list(step) for step in play(RandomAgent("x"), Household(seed), 30)] for seed in (1, 4)]
    for hash_seed in ("1", "2"):
        assert json.loads(run_python({**os.environ, "PYTHONHASHSEED": hash_seed}, "-c", code)) == here


def test_what_cannot_be_done_changes_nothing_and_all_that_is_offered_can() -> None:
    game, rng = Household(3), random.Random(0)
    for action in ("take apple 9 from shelf 1", "go to moon 1", "", "examine apple 1"):
        before = game.state
        game.step(action)
        assert game.state == before and game.observation == "Nothing happens."
    for _ in range(60):
        game.step(rng.choice(game.actions))
        assert game.observation != "Nothing happens."
        assert len(game.actions) == len(set(game.actions))


class Truthful:
    """A model that knows the game: in writing it gives the plan or its first command, in numbers what is true."""

    def __init__(self, game: Household) -> None:
        self.game, self.prompts = game, list[str]()

    def chat(self, messages: Sequence[Any], *, max_tokens: int) -> str:
        self.prompts.append(messages[-1]["content"])
        is_plan = "List the subtasks" in self.prompts[-1]
        return (
            "\n".join(f"{idx}. {step}" for idx, step in enumerate(self.game.plan(), 1))
            if is_plan
            else (f"Next: {self.game.oracle_action()}")
        )

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [0.0 if self._is_true(prompt, text.strip()) else -9.0 for prompt, text in pairs]

    def _is_true(self, prompt: str, text: str) -> bool:
        plan = self.game.plan()
        question = prompt.splitlines()[-2]
        if question.startswith("Question: Is this done: "):
            is_done = question.removeprefix("Question: Is this done: ").removesuffix("?") not in plan
            return text == ("yes" if is_done else "no")
        if question.startswith("Question: Does a "):
            thing = question.removeprefix("Question: Does a ").removesuffix(" matter for it?")
            return text == ("yes" if any(thing in step for step in plan[:1]) else "no")
        return text == plan[0]


@pytest.mark.parametrize("agent", ["direct", "agentkit", "spring", "pet"])
def test_every_agent_wins_all_games_with_a_model_that_knows(agent: str) -> None:
    for seed in GAMES:
        game = Household(seed)
        num_steps = len(game.plan())
        model = Truthful(game)
        history = play(AGENTS[agent](model), game, 3 * num_steps)
        assert game.is_done and len(history) == num_steps
        assert all(game.goal in prompt for prompt in model.prompts[:1])


def test_spring_asks_its_nine_questions_with_the_answers_of_their_parents_only() -> None:
    path = Path(__file__).parents[2] / "minipuzzle" / "abilities" / "play" / "spring.toml"
    game = Household(0)
    asked: list[list[str]] = []

    class Model(Truthful):
        def chat(self, messages: Sequence[Any], *, max_tokens: int) -> str:
            asked.append([message["role"] for message in messages])
            return super().chat(messages, max_tokens=max_tokens)

    GraphAgent(read_graph(path), Model(game), context="Rules.").act(game, ())
    num_parents = [(len(roles) - 2) // 2 for roles in asked]
    assert num_parents == [0, 0, 1, 1, 3, 1, 1, 1, 1]


def test_pet_plans_once_moves_on_when_done_and_keeps_two_things_at_least() -> None:
    game = Household(2)
    model = Truthful(game)
    agent = PetAgent(model)
    play(agent, game, 50)
    assert len(model.prompts) == 1 and len(agent.subtasks) >= 4

    class Sceptic(Truthful):
        def _is_true(self, prompt: str, text: str) -> bool:
            return text == "no" if "Question:" in prompt.splitlines()[-2] else super()._is_true(prompt, text)

    game = Household(2)
    history = play(PetAgent(Sceptic(game)), game, 4)
    assert len(history) == 4


def test_recorded_decisions_are_the_oracles() -> None:
    items = recorded_decisions("household", Sampling(num_items=6, seed=0))
    for number, item in enumerate(items):
        game = Household(number)
        history = play(OracleAgent(), Household(number), 99)
        assert item.options[0].strip() in {action for action, _ in history}
        assert f"Task: {game.goal}\n" in item.prompt and len(item.options) > 5


def test_prompts_show_the_last_steps_only() -> None:
    history = [(f"act {number}", "seen") for number in range(9)]
    assert seen_of(Household(0), history, 2)["history"] == "> act 7\nseen\n> act 8\nseen"
    assert seen_of(Household(0), [], 2)["history"] == "(nothing yet)"


def test_spring_takes_from_a_paper_what_is_about_the_game() -> None:
    source = "x\\begin{document}\nWe thank you. % not this\n\nWood is cut from trees.\n\n\\end{document}junk"
    assert paragraphs_of(source) == ["We thank you.", "Wood is cut from trees."]
    asked: list[str] = []

    def ask(messages: Sequence[Any], max_tokens: int) -> str:
        asked.append(messages[0]["content"])
        if "yes or no" in asked[-1]:
            return "Yes." if "Wood" in asked[-1] else "No."
        return "Cut wood." if "repetitions" in asked[-1] else "cut wood, cut wood"

    context = spring_context(ask, source, about="a game")
    assert context.count("Cut wood.") == 4 and "thank" not in context
    assert len(asked) == 2 + 1 + 4 * 2


def test_games_stand_beside_chance_and_the_oracle(tiny_folder: Path, tmp_path: Path) -> None:
    graph = tmp_path / "short.toml"
    node = '[nodes.action]\nprompt = "$goal$"\nread = "choice"\nmax_tokens = 1\n'
    graph.write_text(node + 'options = {of = "actions", otherwise = "look"}\n', encoding="utf-8")
    arguments = ("abilities", tiny_folder, "--worlds", "household", "--agent", graph, "--episodes", 2)
    found = run_json(*arguments, "--device", "cpu", "-o", tmp_path / "out")
    (name,) = found["references"]
    assert found["references"][name]["the oracle"] == 1.0 and found["references"][name]["chance"] < 1.0
    lines = (tmp_path / "out" / "decisions.jsonl").read_text(encoding="utf-8").splitlines()
    games = [json.loads(json.loads(line)["answer"]) for line in lines]
    assert [len(game) for game in games] == [3 * len(Household(seed).plan()) for seed in (0, 1)]
    assert {action for game in games for action, _ in game} == {"look"}
    assert "did you mean direct" in run_cli(*arguments[:4], "--agent", "dirct").output
