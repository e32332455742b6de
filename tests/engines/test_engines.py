"""Guarantee: real engines, each in an environment of its own, load our exports and compute what we say they compute.

mlx-lm and vLLM's CPU build read the BF16 folder; vLLM reads the FP8 folders of both layouts, those of a hybrid whose
layers differ in width, and those of another family. FP8 is judged layer by layer on probe inputs, against our emulation
of weights and activations in FP8 and against weights alone; tokens prove nothing there. `make test-engines` runs this.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import minipuzzle
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import Units, keep_everything
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import sample_windows
from minipuzzle.export.reader import QuantizedCheckpoint, open_any
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.quality.evaluate import divergence_sums
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.tiny_models import VOCABULARY, write_family_checkpoint

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny_hybrid"
ENGINES = ROOT / ".venv-engines"
PROMPT_LENGTHS = (5, 37, 150, 300)
NUM_NEW_TOKENS = 24
# nats/token, of vLLM in BF16 from our float32 emulation; rounding is amplified more by random weights
MAX_KL, MAX_KL_RANDOM = 0.01, 0.1
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# The engines verify here.
BF16, FP8 = ExportRequest(verifies=False), ExportRequest(scheme="fp8", verifies=False)
REQUESTS = {
    "bf16": BF16,
    "modelopt": replace(FP8, fp8_kv_cache=True),
    "compressed-tensors": replace(FP8, scheme="fp8-dynamic", flavour="compressed-tensors"),
    "puzzle": replace(BF16, is_puzzle=True),
    "puzzle-fp8": replace(FP8, is_puzzle=True),
}
pytestmark = [pytest.mark.slow, pytest.mark.engines]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an engine computed."""

    tensors: dict[str, torch.Tensor]
    methods: dict[str, str]
    caches: tuple[str, ...] = ()
    can_cache_fp8: bool = False


class Folders(dict[str, Path]):
    """The embedded hybrid in each format, calibrated on its text, and other models; made when they are asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.source = Checkpoint.open(EXAMPLE / "model")
        documents = read_documents([EXAMPLE / "text" / "calibration.jsonl"])
        tokenizer = load_tokenizer(self.source.folder)
        self.token_ids = sample_windows(tokenizer, documents, num_samples=4, sequence_length=256)
        write_prompts(root, sample_windows(tokenizer, documents, num_samples=4, sequence_length=300, seed=1))

    def __missing__(self, name: str) -> Path:
        self[name] = export_llama(self.root / name) if name == "llama" else self.root / name
        if name in REQUESTS:
            is_puzzle = REQUESTS[name].is_puzzle
            source = cut_unevenly(self.source, self.root / f"{name}-source") if is_puzzle else self.source
            export_checkpoint(source, self[name], REQUESTS[name], calibration_token_ids=self.token_ids)
        return self[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("exports"))


def cut_unevenly(source: Checkpoint, out: Path) -> Checkpoint:
    """The hybrid with MLPs of three widths, and one KV group in one attention layer; nothing is said of its quality."""
    mlp, attention = source.architecture.layer_indices("mlp"), source.architecture.layer_indices("attention")
    ffn: dict[int | None, Units] = {
        layer_idx: tuple(range(256 + 128 * (idx % 2))) for idx, layer_idx in enumerate(mlp[:6])
    }
    plan = replace(keep_everything(source.architecture), kept_units={"ffn": ffn, "kv_group": {attention[1]: (0,)}})
    out.mkdir()
    write_pruned(source, plan, out)
    return Checkpoint.open(out)


def export_llama(root: Path) -> Path:
    """A random model with rotary attention, gated MLPs and tied embeddings, in FP8 with scales a token.

    vLLM's CPU build wants heads of 32 or more, and lacks the kernel that it uses for gated MLPs with static scales.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 512}
    source = Checkpoint.open(write_family_checkpoint(root / "source", "llama", **sizes))
    token_ids = torch.randint(3, VOCABULARY, (8, 300), generator=torch.Generator().manual_seed(3))
    export_checkpoint(source, root / "llama", REQUESTS["compressed-tensors"])
    write_prompts(root, token_ids[:4])
    return root / "llama"


def write_prompts(root: Path, token_ids: torch.Tensor) -> None:
    prompts = [row[:length].tolist() for row, length in zip(token_ids, PROMPT_LENGTHS, strict=True)]
    (root / "prompts.json").write_text(json.dumps(prompts))


def prompts_of(folder: Path) -> list[list[int]]:
    prompts: list[list[int]] = json.loads((folder.parent / "prompts.json").read_text())
    return prompts


def ask(engine: str, folder: Path, *options: str) -> Answer:
    """Run an engine's script in its environment."""
    out = folder.with_name(f"{folder.name}-{engine}-{'-'.join(options)}.safetensors")
    python, script = ENGINES / engine / "bin" / "python", Path(__file__).with_name(f"run_{engine}.py")
    assert python.exists(), "the engines are not set up: run `make test-engines`"
    command = [str(part) for part in (python, script, folder, folder.parent / "prompts.json", *options, out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata() or {}
    return Answer(
        tensors=load_file(out),
        methods=json.loads(metadata.get("methods", "{}")),
        caches=tuple(json.loads(metadata.get("caches", "[]"))),
        can_cache_fp8=json.loads(metadata.get("can_cache_fp8", "false")),
    )


@torch.inference_mode()
def our_logits(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([prompt]), use_cache=False).logits[0].float()
    return logits


@torch.inference_mode()
def our_greedy_tokens(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_NEW_TOKENS):
        tokens.append(int(our_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_mlx_lm_reads_the_bf16_export_and_agrees_on_log_probabilities(folders: Folders) -> None:
    found = ask("mlx", folders["bf16"]).tensors
    model = minipuzzle.load(folders["bf16"])
    for idx, prompt in enumerate(prompts_of(folders["bf16"])):
        difference = (our_logits(model, prompt).log_softmax(-1) - found[f"logprobs.{idx}"]).abs().max()
        print(f"mlx-lm, {len(prompt)} tokens: largest difference of log-probabilities {difference:.1e}")
        assert difference < 1e-4


@pytest.mark.parametrize("name", ["bf16", "puzzle"])
def test_vllm_continues_prompts_with_the_same_tokens_from_bf16(folders: Folders, name: str) -> None:
    found = ask("vllm", folders[name], "float32").tensors
    model = minipuzzle.load(folders[name])
    for idx, prompt in enumerate(prompts_of(folders[name])):
        assert found[f"tokens.{idx}"].tolist() == our_greedy_tokens(model, prompt)
        ours = our_logits(model, prompt)[:-1].log_softmax(-1)
        difference = (ours - found[f"logprobs.{idx}"]).abs().max()
        print(f"vLLM, {name}, float32, {len(prompt)} tokens: same tokens, log-probabilities within {difference:.1e}")
        assert difference < 1e-4


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors", "puzzle-fp8", "llama"])
def test_vllm_computes_each_fp8_layer_as_our_emulation_does(folders: Folders, name: str) -> None:
    answer = ask("vllm", folders[name], "bfloat16")
    export = open_any(folders[name])
    assert isinstance(export, QuantizedCheckpoint)
    num_probed = check_probes(answer, export)
    assert num_probed == len(export.layout.quantized)
    check_cache(answer, export)
    check_divergence(answer, folders[name], MAX_KL_RANDOM if name == "llama" else MAX_KL)


def check_cache(answer: Answer, export: QuantizedCheckpoint) -> None:
    """vLLM reads every stored scale of keys and values; it caches in FP8 where this CPU can."""
    stored = sorted(float(scale) for scale in export.scales.caches.values())
    read = sorted(answer.tensors["cache_scales"].tolist())
    assert len(stored) == (8 if export.layout.fp8_kv_cache else 0)
    assert read == pytest.approx(stored, rel=2**-8)  # BF16 parameters
    has_fp8 = export.layout.fp8_kv_cache and answer.can_cache_fp8
    assert all(("fp8" in cache) == has_fp8 for cache in answer.caches) and answer.caches
    print(f"scales of keys and values read: {len(read)}; KV caches: {', '.join(answer.caches)}")


def check_probes(answer: Answer, export: QuantizedCheckpoint) -> int:
    """Compare every quantised linear layer's output on its probe; returns how many of our modules that covered."""
    scheme = export.layout.scheme
    assert scheme is not None
    num_probed, worst, nearest_plain = 0, 0.0, 1.0
    for engine_name in answer.methods:
        modules = modules_of(engine_name, export)
        assert modules, f"{engine_name} is none of ours"
        if not export.layout.is_quantized(modules[0]):
            assert "Unquantized" in answer.methods[engine_name], engine_name
            continue
        inputs, output = (answer.tensors[f"probe.{engine_name}.{key}"].float() for key in ("x", "y"))
        weight = torch.cat([export.tensor(f"{module}.weight") for module in modules])
        scale = export.scales.inputs.get(modules[0], torch.tensor(1.0))
        expected, plain = scheme.round_inputs(inputs, scale) @ weight.T, inputs @ weight.T
        error = float((output - expected).norm() / expected.norm())
        plain_error = float((output - plain).norm() / plain.norm())
        assert error < 0.01, f"{engine_name}: {error:.2%} from our emulation"
        assert plain_error > 2 * error, f"{engine_name}: weights alone are as near ({plain_error:.2%})"
        worst, nearest_plain = max(worst, error), min(nearest_plain, plain_error)
        num_probed += len(modules)
    print(f"{num_probed} modules: at most {worst:.2%} from our emulation; weights alone at least {nearest_plain:.2%}")
    return num_probed


def modules_of(engine_name: str, export: QuantizedCheckpoint) -> list[str]:
    """Our names of what an engine's module computes, in its order."""
    name = re.sub(r"^model\.", export.family.modules.disk_prefix, engine_name)
    joined = next((last for last in JOINED if name.endswith(last)), None)
    names = [name] if joined is None else [name.removesuffix(joined) + part for part in JOINED[joined]]
    known = {*export.layout.quantized, *export.layout.ignored}
    return [module for module in names if module in known]


def check_divergence(answer: Answer, folder: Path, max_kl: float) -> None:
    """The KL of an engine in BF16 from our emulation in float32."""
    model = minipuzzle.load(folder)
    kl, num_tokens = 0.0, 0
    for idx, prompt in enumerate(prompts_of(folder)):
        ours = our_logits(model, prompt)[:-1]
        kl += divergence_sums(ours, answer.tensors[f"logprobs.{idx}"])[0]
        num_tokens += len(ours)
    print(f"KL of vLLM in BF16 from our emulation: {kl / num_tokens:.2g} nats/token on {num_tokens} tokens")
    assert kl / num_tokens < max_kl
