"""An architecture: the layers of a model and the tensors around them, read from config.json and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from minipuzzle.architecture.kinds import LAYER_KINDS, TRUNK, VOCABULARY
from minipuzzle.architecture.layers import HIDDEN, LayerSpec, NormSpec, TensorSpec
from minipuzzle.errors import MinipuzzleError

# Layouts of a cut model. Uniform: complete blocks and one width an axis, which every engine loads.
UNIFORM, PER_LAYER = "uniform", "per-layer"
CARRIED = "carried"  # the part of a composite outside its language model


@dataclass(frozen=True, kw_only=True)
class FusedExperts:
    """How one tensor of a decoder block holds weights of all its experts, by the roles they have in each.

    ``name``: of the tensor in its block. ``tensor``: of what it holds in the module of a role. Rows of several roles
    lie one after the other, or in turns if ``is_interleaved``; ``is_transposed``: inputs first, then outputs.
    """

    name: str
    roles: tuple[str, ...]
    tensor: str = "weight"
    is_interleaved: bool = False
    is_transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """How a family names its tensors, and how its layers share decoder blocks.

    ``mixers`` maps a layer kind to (mixer prefix, norm name), ``roles`` to the names of modules within, by role, where
    they are not the kind's own; a mixer of several modules of the block, whose outputs are summed, has no prefix.
    ``slots`` maps kinds to their place in a decoder block, where one holds several layers: a layer joins the block
    before it if its place there is still to come. ``fused``: tensors that hold all experts of a block, in files that
    have them; ``is_always_fused``: no other files do.
    ``ties_head``: whether engines read a head that is tied to the embeddings.
    """

    block_prefix: str  # with {block_idx}
    mixers: Mapping[str, tuple[str, str]]
    embeddings: str
    final_norm: str
    head: str
    norm: NormSpec = field(default_factory=NormSpec)
    slots: Mapping[str, int] = field(default_factory=dict)
    roles: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fused: tuple[FusedExperts, ...] = ()
    is_always_fused: bool = False
    ties_head: bool = True

    @property
    def layers_per_block(self) -> int:
        """Layers of a complete decoder block."""
        return max(self.slots.values(), default=0) + 1

    def block(self, block_idx: int) -> str:
        """Prefix of all tensors of one decoder block."""
        return self.block_prefix.format(block_idx=block_idx)


@dataclass(frozen=True, kw_only=True)
class PlacedTensor:
    """A tensor of a model with its full name on disk, the sizes its axes have there, and where it belongs."""

    name: str
    spec: TensorSpec
    sizes: Mapping[str, int]
    layer_idx: int | None  # None: embeddings, final norm or head
    part: str  # layer kind, or "embeddings", "final_norm", "head", "carried"

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension."""
        return self.spec.shape(self.sizes)

    @property
    def num_elements(self) -> int:
        """Elements of the whole tensor."""
        return self.spec.num_elements(self.sizes)

    @property
    def num_active_elements(self) -> int:
        """Elements that one token uses: of a routed expert's tensor, its share of the experts."""
        if not self.spec.routed:
            return self.num_elements
        return self.num_elements * self.sizes["experts_per_token"] // self.sizes["expert"]


def carried_tensor(name: str, shape: tuple[int, ...], follows: frozenset[str], *, is_dispensable: bool) -> PlacedTensor:
    """A tensor outside the language model."""
    axes = [str(dim_idx) for dim_idx in range(len(shape))]
    spec = TensorSpec(
        name=name, dims=tuple(((axis,),) for axis in axes), follows=follows, is_dispensable=is_dispensable
    )
    sizes = dict(zip(axes, shape, strict=True))
    return PlacedTensor(name=name, spec=spec, sizes=sizes, layer_idx=None, part=CARRIED)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a file: one of the model's, or one that holds those of all experts of a block, expert by expert."""

    name: str
    parts: tuple[PlacedTensor, ...]
    form: FusedExperts | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension."""
        shape = self.parts[0].shape
        if self.form is None:
            return shape
        num_rows, rest = shape[0] * len(self.form.roles), shape[1:]
        one = (*rest, num_rows) if self.form.is_transposed else (num_rows, *rest)
        return (len(self.parts) // len(self.form.roles), *one)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Layers of a model from first to last, plus embeddings, final norm and LM head.

    ``carried``: tensors of a stored composite outside its language model, which nothing else here counts.
    ``ssm_state_precision``: in which config.json asks engines to keep the SSM state; it shapes no weight.
    """

    model_type: str
    layers: tuple[LayerSpec, ...]
    hidden: int
    vocabulary: int
    tied_embeddings: bool
    names: TensorNames
    ssm_state_precision: str = "fp32"
    carried: tuple[PlacedTensor, ...] = ()

    @property
    def deployed(self) -> Architecture:
        """The architecture as written to disk: with an LM head of its own where engines do not read a tied one."""
        return replace(self, tied_embeddings=self.tied_embeddings and self.names.ties_head)

    @property
    def pattern(self) -> str:
        """One symbol a layer, as in Nemotron-H's ``hybrid_override_pattern``."""
        return "".join(LAYER_KINDS[layer.kind].symbol for layer in self.layers)

    @property
    def layer_counts(self) -> dict[str, int]:
        """Layers of each kind, in the registry's order; kinds that do not occur are left out."""
        counts = Counter(layer.kind for layer in self.layers)
        return {kind: counts[kind] for kind in LAYER_KINDS if counts[kind]}

    def layer_indices(self, kind: str) -> tuple[int, ...]:
        """Positions of the layers of one kind."""
        return tuple(idx for idx, layer in enumerate(self.layers) if layer.kind == kind)

    def layers_besides(self, indices: Collection[int]) -> tuple[int, ...]:
        """Positions of all layers but some."""
        return tuple(idx for idx in range(len(self.layers)) if idx not in indices)

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the layers of each decoder block; blocks of one layer each, unless the family pairs them.

        Where a block ends makes no difference to what is computed, so attention whose MLP is gone and the MLP of a
        later block, whose attention is gone, make a complete block.
        """
        blocks: list[list[int]] = []
        slot_before = self.names.layers_per_block
        for layer_idx, layer in enumerate(self.layers):
            slot = self.names.slots.get(layer.kind, 0)
            if slot <= slot_before:
                blocks.append([])
            blocks[-1].append(layer_idx)
            slot_before = slot
        return tuple(map(tuple, blocks))

    @cached_property
    def _block_of_layer(self) -> dict[int, int]:
        return {layer_idx: block_idx for block_idx, block in enumerate(self.blocks) for layer_idx in block}

    def block_of(self, layer_idx: int) -> int:
        """Position of the decoder block of a layer."""
        return self._block_of_layer[layer_idx]

    def removable(self, layout: str = UNIFORM) -> tuple[tuple[int, ...], ...]:
        """Positions of layers that are kept or removed together.

        config.json of a family that pairs layers in a block cannot say that one of them is missing: in the uniform
        layout whole blocks go, in the per-layer layout any layer.
        """
        return self.blocks if layout == UNIFORM else tuple((layer_idx,) for layer_idx in range(len(self.layers)))

    def removable_counts(self, layout: str = UNIFORM) -> dict[str, int]:
        """How many there are to remove, by the kind of the first layer of each, in the registry's order."""
        counts = Counter(self.layers[indices[0]].kind for indices in self.removable(layout))
        return {kind: counts[kind] for kind in LAYER_KINDS if counts[kind]}

    def width(self, axis: str) -> int | None:
        """The size of an axis if all layers that have it agree; None if no layer has it or they differ."""
        found = set(self.widths(axis))
        return found.pop() if len(found) == 1 else None

    def widths(self, axis: str) -> list[int]:
        """The sizes of an axis, wherever the model has it."""
        every_size = (self.sizes(layer_idx) for layer_idx in (None, *range(len(self.layers))))
        return [sizes[axis] for sizes in every_size if axis in sizes]

    def sizes(self, layer_idx: int | None) -> Mapping[str, int]:
        """The sizes of the axes of a layer, or of what lies around the layers (None)."""
        return self._outer_sizes if layer_idx is None else self.layers[layer_idx].sizes

    @cached_property
    def _outer_sizes(self) -> Mapping[str, int]:
        return {"hidden": self.hidden, VOCABULARY: self.vocabulary}

    def own_sizes(self, layer_idx: int | None) -> dict[str, int]:
        """The sizes of the axes that may be cut in one layer alone, or in the model as a whole (None)."""
        if layer_idx is not None and not 0 <= layer_idx < len(self.layers):
            return {}
        kind = TRUNK if layer_idx is None else LAYER_KINDS[self.layers[layer_idx].kind]
        return {axis: size for axis, size in self.sizes(layer_idx).items() if axis in kind.prunable_axes}

    def layer_tensors(self, layer_idx: int) -> Iterator[PlacedTensor]:
        """The tensors of one layer, its input norm first."""
        layer = self.layers[layer_idx]
        mixer_prefix, norm_name = self.names.mixers[layer.kind]
        norms = self.names.norm.tensors(norm_name)
        mixer = LAYER_KINDS[layer.kind].tensors(layer, self.names.roles.get(layer.kind))
        prefix = self.names.block(self.block_of(layer_idx))
        for spec, path in (*((spec, prefix) for spec in norms), *((spec, prefix + mixer_prefix) for spec in mixer)):
            yield PlacedTensor(
                name=path + spec.name, spec=spec, sizes=layer.sizes, layer_idx=layer_idx, part=layer.kind
            )

    def outer_tensors(self) -> Iterator[PlacedTensor]:
        """Embeddings, final norm and LM head (none of its own where it is tied to the embeddings)."""
        sizes, table = self._outer_sizes, (((VOCABULARY,),), HIDDEN)
        outer = [("embeddings", TensorSpec(name=self.names.embeddings, dims=table))]
        outer += [("final_norm", spec) for spec in self.names.norm.tensors(self.names.final_norm)]
        if not self.tied_embeddings:
            outer.append(("head", TensorSpec(name=self.names.head, dims=table)))
        for part, spec in outer:
            yield PlacedTensor(name=spec.name, spec=spec, sizes=sizes, layer_idx=None, part=part)

    def require_free(self, axis: str) -> None:
        """Refuse to cut an axis on which a carried tensor depends that the model cannot do without.

        Raises: MinipuzzleError naming the tensor.
        """
        for placed in self.carried:
            if axis in placed.spec.follows and not placed.spec.is_dispensable:
                problem = f"{axis} cannot be cut: {placed.name}, outside the language model, has its size"
                raise MinipuzzleError(problem, f"leave {axis} as it is")

    def cut_to(self, layers: tuple[LayerSpec, ...], hidden: int) -> Architecture:
        """With other layers and hidden size, and without the carried tensors that this leaves no place for."""
        cut = replace(self, layers=layers, hidden=hidden)
        kept = (t for t in self.carried if not any(set(cut.widths(a)) - set(self.widths(a)) for a in t.spec.follows))
        return replace(cut, carried=tuple(kept))

    def tensors(self) -> Iterator[PlacedTensor]:
        """Every tensor of the model, layers in order, then what lies around them."""
        for layer_idx in range(len(self.layers)):
            yield from self.layer_tensors(layer_idx)
        yield from self.outer_tensors()

    def stored_tensors(self, *, is_fused: bool) -> Iterator[StoredTensor]:
        """Every tensor as it lies in files; ``is_fused``: those of experts in one for all of them."""
        for layer_idx in range(len(self.layers)):
            fused: dict[FusedExperts, list[PlacedTensor]] = {}
            for placed in self.layer_tensors(layer_idx):
                form = self._form_of(placed) if is_fused else None
                if form is None:
                    yield StoredTensor(name=placed.name, parts=(placed,))
                else:
                    fused.setdefault(form, []).append(placed)
            prefix = self.names.block(self.block_of(layer_idx))
            for form, parts in fused.items():
                yield StoredTensor(name=prefix + form.name, parts=tuple(parts), form=form)
        outer = (*self.outer_tensors(), *self.carried)
        yield from (StoredTensor(name=placed.name, parts=(placed,)) for placed in outer)

    def _form_of(self, placed: PlacedTensor) -> FusedExperts | None:
        if placed.spec.unit is None:
            return None
        tensor = placed.name.rpartition(".")[2]
        return next((f for f in self.names.fused if placed.spec.role in f.roles and f.tensor == tensor), None)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters_by_part().values())

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token uses: all but those of the experts it is not sent to."""
        return sum(tensor.num_active_elements * times for tensor, times in self.distinct_tensors())

    def parameters_by_part(self) -> dict[str, int]:
        """Parameters by layer kind and for embeddings, final norm and head."""
        parameters: Counter[str] = Counter()
        for tensor, times in self.distinct_tensors():
            parameters[tensor.part] += tensor.num_elements * times
        return dict(parameters)

    def distinct_layers(self) -> list[tuple[int, int]]:
        """(index of the first, number) of layers that are alike. Large models are a few layers many times over."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for layer_idx, layer in enumerate(self.layers):
            alike.setdefault((layer.kind, tuple(layer.sizes.items()), layer.options), []).append(layer_idx)
        return [(indices[0], len(indices)) for indices in alike.values()]

    def distinct_tensors(self) -> Iterator[tuple[PlacedTensor, int]]:
        """One tensor for all that are alike, and how often it occurs: for sums over all tensors."""
        for layer_idx, times in self.distinct_layers():
            yield from ((tensor, times) for tensor in self.layer_tensors(layer_idx))
        yield from ((tensor, 1) for tensor in self.outer_tensors())

    def fingerprint(self) -> str:
        """A short hash of everything that shapes the weights."""
        description = [
            self.model_type,
            self.hidden,
            self.vocabulary,
            self.tied_embeddings,
            [[layer.kind, sorted(layer.sizes.items()), sorted(layer.options)] for layer in self.layers],
        ]
        return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]
