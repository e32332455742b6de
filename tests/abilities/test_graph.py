"""Guarantee: prompt graphs have AgentKit's semantics: order, conversations, re-asking, changes that end with a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.abilities.play.graph import NOT_ANSWERED, Graph, Message, Node, Pass, UnreadableError
from minipuzzle.abilities.play.graph_files import READERS, read_graph
from minipuzzle.errors import MinipuzzleError, MinipuzzleWarning


class Scripted:
    """Answers by the prompt, else with its echo; keeps the conversations."""

    def __init__(self, **answers: Sequence[str]) -> None:
        self.answers = {prompt: list(texts) for prompt, texts in answers.items()}
        self.conversations: list[list[tuple[str, str]]] = []

    def __call__(self, messages: Sequence[Message], max_tokens: int) -> str:
        self.conversations.append([(message["role"], message["content"]) for message in messages])
        asked = [m["content"] for m in messages if m["role"] == "user" and not m["content"].startswith("That cannot")]
        scripted = self.answers.get(asked[-1])
        return scripted.pop(0) if scripted else asked[-1].upper()


def graph_of(edges: dict[str, str], **readers: Callable[[str, Pass], Any]) -> Graph:
    """Nodes whose prompts are their names; "a b >c" needs a and b, and waits for c."""
    nodes = []
    for key, waits in edges.items():
        parts = waits.split()
        nodes.append(
            Node(
                key=key,
                prompt=key,
                needs=tuple(part for part in parts if part[0] != ">"),
                after=tuple(part[1:] for part in parts if part[0] == ">"),
                read=readers.get(key),
            )
        )
    return Graph(nodes)


# Edges, and the order of asking, found by hand from the rules of AgentKit's queue.
ORDERS = [
    ({"a": "", "b": "a", "c": "b"}, "abc"),
    ({"c": "b", "b": "a", "a": ""}, "abc"),
    ({"a": "", "b": "", "c": "a b", "d": "a"}, "abcd"),
    ({"a": "", "b": "", "d": "a", "c": "a b"}, "abdc"),
    ({"a": "", "x": "a c", "y": "a", "c": "y"}, "aycx"),
    ({"a": "", "b": ">a", "c": ">b"}, "abc"),
    ({"a": ">c", "b": "", "c": "b"}, "bca"),
    ({"a": "", "b": "a", "c": "a", "d": "b c"}, "abcd"),
    ({"b": "", "a": "", "d": "a", "c": "b >d"}, "badc"),
]


@pytest.mark.parametrize(("edges", "order"), ORDERS)
def test_nodes_are_asked_in_the_order_of_the_queue(edges: dict[str, str], order: str) -> None:
    assert "".join(graph_of(edges).run(Scripted()).order) == order


def test_needs_precede_the_prompt_in_their_order_and_order_edges_do_not() -> None:
    ask = Scripted(a=["one"], b=["two"])
    nodes = [
        *(Node(key=key, prompt=key) for key in ("a", "b", "c")),
        Node(key="d", prompt="d", needs=("b", "a"), after=("c",)),
    ]
    Graph(nodes, system="be brief").run(ask)
    turns = [("user", "b"), ("assistant", "two"), ("user", "a"), ("assistant", "one"), ("user", "d")]
    assert ask.conversations[-1] == [("system", "be brief"), *turns]


@pytest.mark.parametrize("edges", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "", "b": "a c", "c": ">b"}])
def test_circles_are_refused(edges: dict[str, str]) -> None:
    with pytest.raises(MinipuzzleError, match="circle"):
        graph_of(edges)


def test_edges_from_nowhere_and_double_names_are_refused() -> None:
    with pytest.raises(MinipuzzleError, match="'x', which is no node"):
        graph_of({"a": "x"})
    with pytest.raises(MinipuzzleError, match="one name"):
        Graph([Node(key="a", prompt=""), Node(key="a", prompt="")])


def test_an_answer_that_cannot_be_read_is_asked_for_again() -> None:
    def number(answer: str, _running: Pass) -> int:
        if not answer.isdigit():
            raise UnreadableError("it must be a number.")
        return int(answer)

    ask = Scripted(a=["many", "some", "7"])
    assert graph_of({"a": ""}, a=number).run(ask).values == {"a": 7}
    assert [text for _, text in ask.conversations[-1]] == [
        "a",
        "many",
        "That cannot be used: it must be a number. Answer again.",
        "some",
        "That cannot be used: it must be a number. Answer again.",
    ]
    ask = Scripted(a=["many", "some", "few", "7"])
    with pytest.warns(MinipuzzleWarning, match="'a' got no answer"):
        assert graph_of({"a": "", "b": "a"}, a=number).run(ask).values["a"] == NOT_ANSWERED
    assert ("assistant", NOT_ANSWERED) in ask.conversations[-1]


def test_a_hook_that_fails_halfway_changed_nothing() -> None:
    def change(answer: str, running: Pass) -> str:
        running.add_node(Node(key=f"new{len(running.nodes)}", prompt="new"))
        if answer == "bad":
            raise UnreadableError("no.")
        return answer

    assert graph_of({"a": ""}, a=change).run(Scripted(a=["bad", "good"])).order == ["a", "new1"]


def test_changes_hold_for_one_pass() -> None:
    passes = []

    def change(answer: str, running: Pass) -> str:
        passes.append(answer)
        if len(passes) == 1:
            running.add_node(Node(key="more", prompt="more", needs=("a",)), before=["c"])
            running.add_edge("b", "c")
            running.remove_edge("d", "c")
            running.store["seen"] = True
        return answer

    graph = graph_of({"a": "", "d": "a", "b": "a", "c": "a d"}, a=change)
    store: dict[str, Any] = {}
    ask = Scripted()
    first = graph.run(ask, store)
    assert first.order == ["a", "d", "b", "more", "c"]
    assert [text for role, text in ask.conversations[-1] if role == "user"] == ["a", "more", "b", "c"]
    assert graph.run(ask, store).order == ["a", "d", "b", "c"] and store == {"seen": True}
    assert [text for role, text in ask.conversations[-1] if role == "user"] == ["a", "d", "c"]


def test_skipped_nodes_keep_their_answers_of_the_pass_before() -> None:
    passes = []

    def gate(answer: str, running: Pass) -> str:
        passes.append(answer)
        if len(passes) > 1:
            running.skip("b", "c")
        return answer

    graph = graph_of({"a": "", "b": "a", "c": "b", "d": "c"}, a=gate)
    assert graph.run(Scripted(b=["old b"], c=["old c"])).order == ["a", "b", "c", "d"]
    ask = Scripted()
    second = graph.run(ask)
    assert second.order == ["a", "d"] and second.values["b"] == "old b"
    assert ask.conversations[-1] == [("user", "c"), ("assistant", "old c"), ("user", "d")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda running: running.add_edge("c", "a"), "answered already"),
        (lambda running: running.add_edge("c", "b"), "answered already"),
        (lambda running: running.remove_edge("a", "b"), "answered already"),
        (lambda running: running.skip("a"), "answered already"),
        (lambda running: running.skip("c"), "no answer of an earlier pass"),
        (lambda running: running.add_node(Node(key="c", prompt="")), "there already"),
        (lambda running: running.add_node(Node(key="x", prompt="", needs=("d",)), before=["c"]), "circle"),
        (lambda running: running.remove_edge("a", "d"), "does not wait"),
    ],
)
def test_changes_that_make_no_sense_are_refused(change: Callable[[Pass], None], words: str) -> None:
    def read(answer: str, running: Pass) -> str:
        change(running)
        return answer

    with pytest.raises(MinipuzzleError, match=words):
        graph_of({"a": "", "b": "a", "c": "b", "d": "c"}, b=read).run(Scripted())


def test_prompts_take_values_of_the_store() -> None:
    graph = Graph([Node(key="a", prompt="$goal.text$ of $list$, for $5 and 6$")])
    ask = Scripted()
    graph.run(ask, {"goal": {"text": "one"}, "list": ["x", "y"]})
    assert ask.conversations[0] == [("user", "one of x\ny, for $5 and 6$")]
    with pytest.raises(MinipuzzleError, match=r"\$goal\.text\$"):
        graph.run(ask, {"list": []})


@pytest.mark.parametrize(
    ("reader", "answer", "options", "value"),
    [
        ("json", 'First {"a": 1} then {"b": {"c": 2}} end', {}, {"b": {"c": 2}}),
        ("json", 'x {"a": 1', {}, None),
        ("json", '{"a": "b"}', {"keys": {"a": "text"}}, {"a": "b"}),
        ("json", '{"a": true}', {"keys": {"a": "number"}}, None),
        ("json", '{"a": 1}', {"keys": {"b": "number"}}, None),
        ("choice", "I would GO TO SINK 10, not sink 1", {"of": "acts"}, "go to sink 10"),
        ("choice", "dance", {"of": "acts"}, None),
        ("choice", "dance", {"of": "acts", "otherwise": "look"}, "look"),
        ("yes-no", "Well, yes.", {}, "yes"),
        ("yes-no", "know", {}, None),
        ("lines", "1. take it\n\n- put it", {}, "take it\nput it"),
    ],
)
def test_readers_read(reader: str, answer: str, options: dict[str, Any], value: Any) -> None:
    running = Pass(nodes={}, store={"acts": ["go to sink 1", "go to sink 10", "look"]}, previous={})
    if value is None:
        with pytest.raises(UnreadableError):
            READERS[reader](answer, running, **options)
    else:
        assert READERS[reader](answer, running, **options) == value


def test_graphs_are_read_from_files_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "graph.toml"
    text = 'system = "s"\n[nodes.plan]\nprompt = "Plan $goal$"\n[nodes.act]\nprompt = "Act"\nneeds = ["plan"]\n'
    path.write_text(text + 'read = "shout"\noptions = {mark = "!"}\n', encoding="utf-8")
    graph = read_graph(path, {"shout": lambda answer, _running, mark: answer + mark})
    assert graph.run(Scripted(), {"goal": "x"}).values == {"plan": "PLAN X", "act": "ACT!"}
    assert graph.to_mermaid() == 'flowchart TD\n  n0["plan"]\n  n1["act"]\n  n0 --> n1\n'
    for bad in ("[nodes.a]\n", '[nodes.a]\nprompt = "x"\nneed = ["b"]\n', 'prompt = "x"\n'):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(MinipuzzleError, match=r"graph\.toml"):
            read_graph(path)
    path.write_text('[nodes.a]\nprompt = "x"\nread = "jsn"\n', encoding="utf-8")
    with pytest.raises(MinipuzzleError, match="unknown reader of answers 'jsn'"):
        read_graph(path)


def test_names_cannot_put_markup_into_a_picture() -> None:
    drawn = Graph([Node(key='a"]<script>', prompt="")]).to_mermaid()
    assert "<" not in drawn and drawn.count('"') == 2
