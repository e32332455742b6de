"""What a model family is, and what entries of the table share: fields of config.json, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import LayerSpec
from minipuzzle.architecture.model import Architecture, TensorNames
from minipuzzle.errors import MinipuzzleError

Config = Mapping[str, Any]
MAX_LAYERS = 10_000
_POSITIVE_NUMBERS = ("layer_norm_epsilon", "rms_norm_eps", "norm_eps", "rope_theta")
_POSITIVE_WHOLE_NUMBERS = ("chunk_size", "mamba_chunk_size")
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_PRECISION_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_STATE_DTYPES = tuple(_PRECISION_OF_DTYPE)


@dataclass(frozen=True, kw_only=True)
class ModulePaths:
    """Where transformers keeps the parts of a model in memory, and how tensor names on disk map there.

    ``layers`` is the list of decoder blocks. ``rotary``: the module of position embeddings, if there is one.
    ``outer_prefix``: on disk, of what lies outside ``disk_prefix``.
    ``other_prefixes``: beginnings of names that other programs write, and ours. ``inner``: parts of names on disk that
    are others in memory. ``ignored``: the beginning of names that transformers leaves aside; may hold config's fields.
    """

    layers: str
    embeddings: str
    final_norm: str
    head: str
    disk_prefix: str
    module_prefix: str
    rotary: str = ""
    outer_prefix: str = ""
    other_prefixes: Mapping[str, str] = field(default_factory=dict)
    inner: Mapping[str, str] = field(default_factory=dict)
    ignored: str = ""

    def disk_name(self, name: str) -> str:
        """Our name on disk of a tensor that another program named in a way that transformers reads, too.

        Weights saved from a model without its head lack the prefix of what is below it.
        """
        bare = (path.removeprefix(self.module_prefix) for path in (self.layers, self.embeddings, self.final_norm))
        if name.startswith(tuple(f"{path}." for path in bare)):
            name = self.disk_prefix + name
        for other, ours in self.other_prefixes.items():
            name = ours + name.removeprefix(other) if name.startswith(other) else name
        return name

    def module_name(self, disk_name: str) -> str:
        """The parameter name in memory of a tensor on disk."""
        for on_disk, in_memory in self.inner.items():
            disk_name = disk_name.replace(on_disk, in_memory)
        if disk_name.startswith(self.disk_prefix):
            return self.module_prefix + disk_name.removeprefix(self.disk_prefix)
        return disk_name.removeprefix(self.outer_prefix)


def _as_it_is(config: Config) -> Config:
    return config


def _alike(_config: Config, architecture: Architecture) -> Architecture:
    return architecture


def _nothing_else(config: dict[str, Any], _source: Config, _architecture: Architecture) -> dict[str, Any]:
    return config


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: data first, and hooks where data does not reach.

    ``kinds`` gives the kind of each layer. ``fields``: those of config.json with the size of an axis, by kind (or
    ``trunk``) and axis. ``options``: by kind, those of its layers; True, or the field that says so. ``defaults``: what
    transformers assumes where config.json is silent. ``only``: fields with the one value that is supported. ``drops``:
    fields that are no longer true of a cut model. ``embedding_scale``, ``residual_scale`` and ``logit_divisor``: fields
    with factors that transformers applies beside the embeddings, to what a layer adds, and to the logits.

    ``complete`` fills what is silent, or refuses what is not supported; ``adjust`` says in what layers differ;
    ``finish`` turns the fields of a cut model, written from the data, into its config.json. ``runs_as``: the model type
    of the transformers class that computes what engines compute, where that is another. ``attention``: transformers'
    name of the implementation that it runs in.

    ``head_dim_derived_by``: engines that take the size of a head for hidden / heads, whatever config.json says.

    ``tiny_config`` is a config.json small enough for tests; ``tiny_variants`` are others, with what it does not have.
    They stand here so that a family is one file, tests included.
    """

    model_type: str
    names: TensorNames
    modules: ModulePaths
    kinds: Callable[[Config], Sequence[str]]
    fields: Mapping[str, Mapping[str, str]]
    tiny_config: Config
    options: Mapping[str, Mapping[str, str | bool]] = field(default_factory=dict)
    defaults: Config = field(default_factory=dict)
    only: Mapping[str, str] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    embedding_scale: str = ""
    residual_scale: str = ""
    logit_divisor: str = ""
    complete: Callable[[Config], Config] = _as_it_is
    adjust: Callable[[Config, Architecture], Architecture] = _alike
    finish: Callable[[dict[str, Any], Config, Architecture], dict[str, Any]] = _nothing_else
    runs_as: Callable[[Config], str] | None = None
    attention: str = "sdpa"
    head_dim_derived_by: tuple[str, ...] = ()
    tiny_variants: Mapping[str, Config] = field(default_factory=dict)

    def obstacle(self, architecture: Architecture) -> str | None:
        """Why some engine would not load a model of this family, in words; None if all load it."""
        layer = next((layer for layer in architecture.layers if layer.kind == "attention"), None)
        if layer is None or not self.head_dim_derived_by:
            return None
        heads, head_dim = layer.sizes["kv_group"] * layer.sizes["queries_per_group"], layer.sizes["head_dim"]
        if heads * head_dim == architecture.hidden:
            return None
        engines = " and ".join(self.head_dim_derived_by)
        return (
            f"{engines} will not load this {self.model_type}: there the size of a head is hidden / heads, "
            f"{architecture.hidden} / {heads} here, not {head_dim}; cut neither kv_group nor hidden for {engines}"
        )

    @property
    def tiny_configs(self) -> dict[str, Config]:
        """All configs for tests, by a name that begins with the model type."""
        variants = {f"{self.model_type}-{name}": config for name, config in self.tiny_variants.items()}
        return {self.model_type: self.tiny_config, **variants}

    def mixer_modules(self, kind: str) -> tuple[str, ...]:
        """The modules of transformers' decoder block that make the mixer of a layer."""
        prefix = self.names.mixers[kind][0]
        paths = [prefix] if prefix else self.names.roles[kind].values()
        return tuple(dict.fromkeys(self.modules.module_name(path).partition(".")[0] for path in paths))

    def language_config(self, config: Config) -> dict[str, Any]:
        """config.json of the language model alone, where it is a part of another."""
        return dict(config)

    def carries(self, _name: str) -> bool:
        """Whether a stored tensor is none of the language model's, but is carried along."""
        return False

    def followed_axes(self, _name: str) -> tuple[frozenset[str], bool]:
        """The axes that a carried tensor depends on, and whether it may go if one of them is cut."""
        return frozenset(), False

    def read(self, config: Config) -> Architecture:
        """The architecture that a config.json describes.

        Raises: MinipuzzleError naming the field that is missing, wrong or not supported.
        """
        for name, value in self.only.items():
            require_one_of(config, name, (value,), value)
        _check_numbers(config, self.logit_divisor)
        config = self.complete({**self.defaults, **config})
        kinds = self.kinds(config)
        found = {kind: self._layer(kind, config) for kind in dict.fromkeys(kinds)}
        architecture = Architecture(
            model_type=self.model_type,
            layers=tuple(found[kind] for kind in kinds),
            hidden=require(config, self.fields["trunk"]["hidden"]),
            vocabulary=require(config, "vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            names=self.names,
        )
        return self.adjust(config, architecture)

    def _layer(self, kind: str, config: Config) -> LayerSpec:
        fields, record = self.fields[kind], LAYER_KINDS[kind]
        if kind == "attention":
            sizes = attention_sizes(config)
        else:
            optional = {name for role in record.roles for name in role.needs | role.lacks}
            present = {
                axis: name for axis, name in fields.items() if axis not in optional or config.get(name) is not None
            }
            sizes = {"hidden": require(config, self.fields["trunk"]["hidden"])}
            sizes |= {axis: require(config, name) for axis, name in present.items()}
        for axis, group in record.unit_groups.items():
            divide(sizes[axis], sizes[group], f"{fields[axis]} by {fields[group]}")
        options = self.options.get(kind, {}).items()
        is_on = (name for name, source in options if source is True or config.get(str(source)))
        return LayerSpec(kind=kind, sizes=sizes, options=frozenset(is_on))

    def write(self, source: Config, architecture: Architecture) -> dict[str, Any]:
        """config.json of a cut model, from that of its source; everything that is not cut stays.

        Raises: MinipuzzleError for layers of unequal widths, or blocks without one of their layers.
        """
        require_whole_blocks(architecture)
        config = {key: value for key, value in source.items() if key not in self.drops}
        config |= {"num_hidden_layers": len(architecture.blocks)}
        config[self.fields["trunk"]["hidden"]] = architecture.hidden
        for kind in architecture.layer_counts:
            sizes = uniform_sizes(architecture, kind)
            config |= {
                self.fields[kind][axis]: sizes[axis] for axis in LAYER_KINDS[kind].prunable_axes if axis in sizes
            }
            if "experts_per_token" in sizes:
                _check_routing(sizes, source)
            if kind == "attention":
                queries = sizes["kv_group"] * sizes["queries_per_group"]
                config["num_attention_heads"] = queries
                if "head_dim" in source or architecture.hidden != queries * sizes["head_dim"]:
                    config["head_dim"] = sizes["head_dim"]
        dtype = source.get("dtype") or source.get("torch_dtype") or "bfloat16"
        # Engines differ in which of the two names they read.
        return self.finish({**config, "dtype": dtype, "torch_dtype": dtype}, source, architecture)


def _check_routing(moe: Mapping[str, int], source: Config) -> None:
    """A router may pick the best groups by their two best experts, then experts within those.

    Raises: MinipuzzleError where too few are left to be picked.
    """
    per_group = moe["expert"] // moe["expert_group"]
    within_reach = per_group * (source.get("topk_group") or 1)
    if per_group < 2 or moe["experts_per_token"] > within_reach:
        raise MinipuzzleError(
            f"{moe['expert']} experts in {moe['expert_group']} groups are too few for a router that picks "
            f"{moe['experts_per_token']} a token",
            "keep more experts",
        )


def require(config: Config, field: str) -> int:
    """A positive whole number of config.json.

    Raises: MinipuzzleError naming the field.
    """
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MinipuzzleError(f"config.json: {field} is {value!r}, not a positive whole number", "complete the file")
    return value


def require_num_layers(config: Config) -> int:
    """The number of decoder blocks.

    Raises: MinipuzzleError where it is none, or more than any model has.
    """
    number = require(config, "num_hidden_layers")
    if number > MAX_LAYERS:
        raise MinipuzzleError(f"config.json: num_hidden_layers is {number:,}; no model has so many", "correct the file")
    return number


def require_names(config: Config, field: str) -> list[str]:
    """A name for each layer: a list, or a text with one symbol each.

    Raises: MinipuzzleError if it is something else.
    """
    names = config.get(field)
    if not isinstance(names, str | list | tuple) or not all(isinstance(name, str) for name in names):
        raise MinipuzzleError(f"config.json: {field} is {names!r}, not a name for each layer", "correct the file")
    return list(names)


def require_as_many(config: Config, field: str, names: Sequence[str]) -> None:
    """Refuse a number of layers that is not the number of their names: readers differ in which they believe.

    Raises: MinipuzzleError naming both fields; a file without a number of layers passes.
    """
    if config.get("num_hidden_layers") is not None:
        require_length(field, names, require_num_layers(config))


def require_positive_number(config: Config, field: str) -> float:
    """A finite number above zero.

    Raises: MinipuzzleError naming the field.
    """
    value = config.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise MinipuzzleError(f"config.json: {field} is {value!r}, not a positive number", "correct the file")
    return float(value)


def _check_numbers(config: Config, logit_divisor: str) -> None:
    """What shapes no weight, and so is read by transformers alone, which takes anything."""
    rope = config.get("rope_parameters")
    for fields in (config, rope if isinstance(rope, Mapping) else {}):
        for name in (*_POSITIVE_NUMBERS, logit_divisor):
            if fields.get(name) is not None:
                require_positive_number(fields, name)
    for name in (name for name in _POSITIVE_WHOLE_NUMBERS if config.get(name) is not None):
        require(config, name)
    for name in (name for name in ("dtype", "torch_dtype") if config.get(name) is not None):
        require_one_of(config, name, _DTYPES, "")


def require_one_of(config: Config, field: str, known: Sequence[str], default: str) -> str:
    """A name in config.json that is among those that are supported.

    Raises: MinipuzzleError naming the field.
    """
    value = config.get(field, default)
    if value not in known:
        raise MinipuzzleError(f"config.json: {field} {value!r} is not supported", f"supported: {', '.join(known)}")
    return str(value)


def state_precision(config: Config, field: str) -> str:
    """The precision in which a field asks engines to keep the state of recurrent layers; float32 where it is silent.

    Raises: MinipuzzleError naming the field.
    """
    return _PRECISION_OF_DTYPE[require_one_of({field: config.get(field) or "float32"}, field, _STATE_DTYPES, "")]


def require_length(field: str, values: Sequence[Any], num_layers: int) -> list[Any]:
    """A list of config.json that names each layer.

    Raises: MinipuzzleError if it names more or fewer.
    """
    if len(values) != num_layers:
        problem = f"config.json: {field} names {len(values)} layers, num_hidden_layers {num_layers}"
        raise MinipuzzleError(problem, "correct the file")
    return list(values)


def divide(numerator: int, denominator: int, what: str) -> int:
    """An exact quotient.

    Raises: MinipuzzleError naming the fields where there is a remainder.
    """
    if numerator % denominator:
        problem = f"config.json: {what}: {numerator} is not a multiple of {denominator}"
        raise MinipuzzleError(problem, "correct the file")
    return numerator // denominator


def attention_sizes(config: Config) -> dict[str, int]:
    """Sizes of grouped-query attention by the field names that most families share."""
    hidden, queries = require(config, "hidden_size"), require(config, "num_attention_heads")
    kv_groups = queries if config.get("num_key_value_heads") is None else require(config, "num_key_value_heads")
    if config.get("head_dim") is None:
        head_dim = divide(hidden, queries, "hidden_size by num_attention_heads")
    else:
        head_dim = require(config, "head_dim")
    return {
        "hidden": hidden,
        "kv_group": kv_groups,
        "queries_per_group": divide(queries, kv_groups, "num_attention_heads by num_key_value_heads"),
        "head_dim": head_dim,
    }


def uniform_sizes(architecture: Architecture, kind: str) -> Mapping[str, int]:
    """The sizes that all layers of a kind share. Windows may differ.

    Raises: MinipuzzleError if others differ.
    """
    layers = [layer for layer in architecture.layers if layer.kind == kind]
    widths = [{axis: size for axis, size in layer.sizes.items() if axis != "window"} for layer in layers]
    if any(other != widths[0] for other in widths):
        raise MinipuzzleError(
            f"the {kind} layers differ in width, which config.json of {architecture.model_type} cannot say",
            "give all layers of a kind the same widths",
        )
    return widths[0]


def require_whole_blocks(architecture: Architecture) -> None:
    """Refuse a model in which a decoder block lacks one of its layers.

    Raises: MinipuzzleError naming the first such block.
    """
    for block_idx, block in enumerate(architecture.blocks):
        if len(block) < architecture.names.layers_per_block:
            kinds = " and ".join(architecture.layers[idx].kind for idx in block)
            raise MinipuzzleError(
                f"block {block_idx} has {kinds} only, which config.json of {architecture.model_type} cannot say",
                "keep or remove whole blocks",
            )
