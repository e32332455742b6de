"""config.json and the other JSON files of a model folder: fields of wrong type and size, broken and hostile JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.damage.material import LENGTH, copy
from tests.damage.runner import DONE, EITHER, REFUSED, Case

# Fields that shape the model or what it computes, by family.
FIELDS = {
    "nemotron_h": (
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "vocab_size"),
        *("layer_norm_epsilon", "chunk_size", "hybrid_override_pattern", "model_type", "use_bias", "use_conv_bias"),
        *("tie_word_embeddings", "dtype", "mlp_hidden_act", "num_hidden_layers", "time_step_limit"),
    ),
    "llama": (
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_theta", "hidden_act", "tie_word_embeddings"),
        *("attention_bias", "mlp_bias", "dtype", "max_position_embeddings", "rope_scaling", "bos_token_id"),
    ),
    "granitemoehybrid": (
        *("hidden_size", "shared_intermediate_size", "num_attention_heads", "num_key_value_heads", "layer_types"),
        *("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_expand"),
        *("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier", "rms_norm_eps"),
    ),
}
WRONG_VALUES: dict[str, Any] = {
    "text": "seven",
    "list": [1, "a"],
    "object": {"a": 1},
    "negative": -3,
    "zero": 0,
    "fraction": 2.5,
    "huge": 10**15,
    "infinite": float("inf"),
    "nan": float("nan"),
}
# Where a strange value is a choice that a config may make, or is not looked at.
HARMLESS = (
    {("max_position_embeddings", name) for name in WRONG_VALUES}
    | {("bos_token_id", name) for name in WRONG_VALUES}
    | {("chunk_size", "huge"), ("rope_theta", "huge")}
)


def evaluated(folder: Path, model: str = "model") -> list[str]:
    """The command that reads all of a model and runs it."""
    length = ["--sequence-length", str(LENGTH), "--max-tokens", "64", "--device", "cpu", "--json"]
    return ["evaluate", model, "--data", "text.jsonl", *length]


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")


def with_model(material: Path, family: str, damage: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """A preparation: a family's model as ``model`` with text beside it, damaged, then evaluated."""

    def prepare(folder: Path) -> list[str]:
        copy(material, folder, family, "text.jsonl")
        (folder / family).rename(folder / "model")
        damage(folder)
        return evaluated(folder)

    return prepare


def _field_cases(material: Path) -> Iterator[Case]:
    for family, fields in FIELDS.items():
        for field in fields:
            for name, value in WRONG_VALUES.items():

                def damage(folder: Path, field: str = field, value: Any = value) -> None:
                    change_config(folder, lambda config: config.update({field: value}))

                expected = EITHER if (field, name) in HARMLESS or name in ("zero", "object", "fraction") else REFUSED
                if field in ("use_bias", "use_conv_bias", "tie_word_embeddings", "attention_bias", "mlp_bias"):
                    expected = EITHER if name == "zero" else REFUSED
                if field.endswith(("multiplier", "scaling", "epsilon", "eps", "theta")) and name in (
                    "negative",
                    "huge",
                ):
                    expected = EITHER
                yield Case(
                    name=f"config/{family}/{field}-{name}",
                    prepare=with_model(material, family, damage),
                    expected=expected,
                )

            def remove(folder: Path, field: str = field) -> None:
                change_config(folder, lambda config: config.pop(field, None))

            yield Case(
                name=f"config/{family}/{field}-missing", prepare=with_model(material, family, remove), expected=EITHER
            )


def broken_json(whole: bytes) -> dict[str, bytes]:
    """Ways in which a JSON file is not one."""
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "nul": b"\0" * 64,
        "list": b"[1, 2, 3]",
        "number": b"7",
        "not-utf8": b'{"a": "\xff\xfe"}',
        "nested": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "long-number": b'{"hidden_size": ' + b"9" * 5000 + b"}",
        "trailing": whole + b"}",
    }


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")


def _file_cases(material: Path) -> Iterator[Case]:
    for name in FILES:
        source = material / "llama" / name
        whole = source.read_bytes() if source.is_file() else b'{"metadata": {}, "weight_map": {}}'
        for what, content in broken_json(whole).items():

            def damage(folder: Path, name: str = name, content: bytes = content) -> None:
                (folder / "model" / name).write_bytes(content)

            yield Case(name=f"json/{name}-{what}", prepare=with_model(material, "llama", damage))
        if source.is_file():

            def mark(folder: Path, name: str = name) -> None:
                path = folder / "model" / name
                path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

            yield Case(name=f"json/{name}-bom", prepare=with_model(material, "llama", mark), expected=EITHER)


def _tokenizer_cases(material: Path) -> Iterator[Case]:
    code = f"open({'CANARY'!r}, 'w').close()\n"

    def hostile(folder: Path) -> None:
        (folder / "model" / "evil.py").write_text(code, encoding="utf-8")
        path = folder / "model" / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
        path.write_text(json.dumps(config), encoding="utf-8")

    yield Case(name="tokenizer/auto-map", prepare=with_model(material, "llama", hostile))

    def hostile_config(folder: Path) -> None:
        (folder / "model" / "evil.py").write_text(code, encoding="utf-8")
        change_config(folder, lambda config: config.update({"auto_map": {"AutoConfig": "evil.Evil"}}))

    yield Case(name="tokenizer/config-auto-map", prepare=with_model(material, "llama", hostile_config), expected=EITHER)

    def vocabulary(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            path = folder / "model" / "tokenizer.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            change(content)
            path.write_text(json.dumps(content), encoding="utf-8")

        return damage

    changes: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
        "all-ids-5": (lambda c: c["model"].update(vocab=dict.fromkeys(c["model"]["vocab"], 5)), REFUSED),
        "ids-beyond": (
            lambda c: c["model"].update(vocab={k: v + 400 for k, v in c["model"]["vocab"].items()}),
            REFUSED,
        ),
        "no-model": (lambda c: c.pop("model"), REFUSED),
        "unknown-model": (lambda c: c["model"].update(type="Magic"), REFUSED),
        "vocab-list": (lambda c: c["model"].update(vocab=[]), REFUSED),
        "merges-broken": (lambda c: c["model"].update(merges=["a"]), REFUSED),
        "no-decoder": (lambda c: c.update(decoder=None), EITHER),
        "version": (lambda c: c.update(version="99"), EITHER),
    }
    for name, (change, expected) in changes.items():
        yield Case(
            name=f"tokenizer/{name}", prepare=with_model(material, "llama", vocabulary(change)), expected=expected
        )

    def template(text: str) -> Callable[[Path], list[str]]:
        def prepare(folder: Path) -> list[str]:
            copy(material, folder, "llama", "text.jsonl")
            (folder / "llama").rename(folder / "model")
            (folder / "model" / "chat_template.jinja").write_text(text, encoding="utf-8")
            record = {"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]}
            (folder / "text.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
            return evaluated(folder)

        return prepare

    templates = {
        "huge-output": ("{% for i in range(100000000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}", REFUSED),
        "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", REFUSED),
        "syntax": ("{% for %}", REFUSED),
        "unknown-name": ("{{ nothing.at.all }}", REFUSED),
        "plain": ("{% for m in messages %}{{ m.content }} {% endfor %}", DONE),
    }
    for name, (text, expected) in templates.items():
        yield Case(name=f"template/{name}", prepare=template(text), expected=expected)


def cases(material: Path) -> Iterator[Case]:
    """All cases of this file."""
    yield from _field_cases(material)
    yield from _file_cases(material)
    yield from _tokenizer_cases(material)

    def floats(folder: Path) -> None:
        change_config(folder, lambda config: config.update({"time_step_limit": [0.0, {"__float__": "Infinity"}]}))

    for family in ("nemotron_h", "granitemoehybrid"):
        yield Case(name=f"config/{family}/tagged-float", prepare=with_model(material, family, floats), expected=DONE)
