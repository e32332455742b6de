"""Guarantee: `minipuzzle score` writes a file that says what was measured, on what, and how, or nothing at all.

The file is read back by the rest of the tool; `--dry-run` predicts the counters of the real run exactly; a killed run
continues with the samples that are left and gives the same scores; mistakes are named with a hint before any work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from importance.alterations import LayerRequest
from importance.layers import Hooks
from importance.measure import measure
from importance.metrics import HeadInputMetrics
from importance.partial import PartialSums
from importance.work import open_stack, predict_work
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.cut.scores import Scores, read_scores
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import sample_windows
from minipuzzle.errors import InputChangedError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.outputs import only_writer
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import load_tokenizer
from tests.support.cli import run_cli
from tests.support.scoring import score_layers
from tests.support.tiny_models import VOCABULARY

SMALL_MEMORY = "800KiB"  # holds any one part of the tiny model, not all of it
SMALL_BYTES = 1000 * 1024  # the same with streams of narrower layers; one sample at a time


def score(model: Path, text: Path, out: Path, *extra: str) -> Result:
    arguments = ["score", str(model), "--data", str(text), "--samples", "5", "--sequence-length", "40", "-o", str(out)]
    return run_cli(*arguments, *extra)


def score_json(model: Path, text: Path, out: Path, *extra: str) -> dict[str, Any]:
    result = score(model, text, out, "--json", *extra)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def assert_no_files(folder: Path, allowed: Sequence[str] = ()) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(allowed)


def test_the_file_holds_finite_scores_of_every_layer_and_how_they_were_made(
    tiny_folder: Path, tiny_checkpoint: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    printed = score_json(tiny_folder, text_file, tmp_path / "s.safetensors", "--channel-samples", "7")
    scores = read_scores(tmp_path / "s.safetensors")
    scores.check_against(tiny_checkpoint.architecture, tiny_checkpoint.fingerprint)
    assert scores.is_measured_here
    assert scores.layer.keys() == LAYER_METRICS.keys()
    assert printed["layer"] == {metric: values.tolist() for metric, values in scores.layer.items()}
    assert scores.token_ids is not None and scores.token_ids.shape == (7, 40)
    assert scores.metadata["architecture_fingerprint"] == tiny_checkpoint.architecture.fingerprint()
    assert (scores.metadata["samples"], scores.metadata["channel_samples"]) == ("5", "7")
    definitions = {name: metric.definition for name, metric in LAYER_METRICS.items()}
    assert json.loads(scores.metadata["metric_definitions"])["layer"] == definitions
    assert json.loads(scores.metadata["tool_versions"])["torch"] == torch.__version__
    assert len(scores.metadata["data_fingerprint"]) == 16
    assert_no_files(tmp_path, ["s.safetensors"])


def test_the_tokens_in_the_file_repeat_the_measurement(
    tiny_folder: Path, tiny_checkpoint: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    score_json(tiny_folder, text_file, tmp_path / "s.safetensors")
    scores = read_scores(tmp_path / "s.safetensors")
    assert scores.token_ids is not None
    again = measure(tiny_checkpoint, torch.from_numpy(scores.token_ids).long())
    for metric, values in scores.layer.items():
        np.testing.assert_array_equal(again.layer[metric], values)
    for key, unit_values in scores.units.items():
        np.testing.assert_array_equal(again.units[key], unit_values)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    hashes = []
    for number, seed in enumerate(("1", "1", "2")):
        score_json(tiny_folder, text_file, tmp_path / f"{number}.safetensors", "--seed", seed)
        hashes.append(read_scores(tmp_path / f"{number}.safetensors").metadata["token_ids_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("memory", ["1GiB", SMALL_MEMORY])
def test_a_dry_run_predicts_the_counters_and_writes_nothing(
    tiny_folder: Path, text_file: Path, tmp_path: Path, memory: str
) -> None:
    out = tmp_path / "s.safetensors"
    predicted = score_json(tiny_folder, text_file, out, "--device-memory", memory, "--dry-run")
    assert_no_files(tmp_path)
    assert predicted["weights_stay_in_memory"] == (memory == "1GiB")
    assert predicted["peak_bytes"] <= predicted["memory_limit_bytes"]
    measured = score_json(tiny_folder, text_file, out, "--device-memory", memory)
    for counter, count in measured["counters"].items():
        assert predicted[counter] == count


def test_people_see_every_layer_and_the_next_step(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    result = score(tiny_folder, text_file, tmp_path / "s.safetensors")
    assert result.exit_code == 0, result.output
    for piece in ("mamba", "attention", "mlp", "◂", "7 layers", "35 layer applications", "next: minipuzzle search"):
        assert piece in result.stdout
    planned = score(tiny_folder, text_file, tmp_path / "t.safetensors", "--dry-run")
    assert "dry run: nothing was written" in planned.stdout


@pytest.mark.parametrize(
    ("extra", "problem", "hint"),
    [
        (["--samples", "100000"], "100000 samples of 40 need 4,000,000", "--samples"),
        (["--samples", "0"], "measure nothing", "--samples"),
        (["--device-memory", "100KiB"], "GiB may be used", "--device-memory"),
        (["--device-memory", "100"], "no known unit", "GiB"),
        (["--device", "nowhere"], "'nowhere' cannot be used", "--device cpu"),
    ],
)
def test_mistakes_are_named_before_any_work(
    tiny_folder: Path, text_file: Path, tmp_path: Path, extra: list[str], problem: str, hint: str
) -> None:
    result = score(tiny_folder, text_file, tmp_path / "s.safetensors", *extra)
    assert result.exit_code == 1
    assert problem in result.stderr and hint in result.stderr and "Traceback" not in result.output
    assert_no_files(tmp_path)


def test_an_output_that_cannot_be_written_is_refused_before_the_measuring(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    result = score(tiny_folder, text_file, tmp_path)
    assert result.exit_code == 1
    assert "is a folder" in result.stderr


def test_scores_and_pictures_replace_their_own_kind_only(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "s.safetensors", tmp_path / "s.png"
    plot.write_text("precious")
    refused = score(tiny_folder, text_file, out, "--plot", str(plot), "--overwrite")
    assert "no such file as would be written" in refused.stderr and plot.read_text() == "precious"
    plot.unlink()
    for extra, code in (((), 0), ((), 1), (("--overwrite",), 0)):
        assert score(tiny_folder, text_file, out, "--plot", str(plot), *extra).exit_code == code
    out.write_bytes((tiny_folder / "model.safetensors").read_bytes())
    assert "no such file" in score(tiny_folder, text_file, out, "--overwrite").stderr
    assert "read as JSON" in score(tiny_folder, text_file, tmp_path / "s.json").stderr


def test_two_measurements_towards_one_file_do_not_meet(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    with only_writer(out, lock=tmp_path / ".s.safetensors.writer"):
        refused = score(tiny_folder, text_file, out)
    assert refused.exit_code == 1 and "is writing" in refused.stderr
    assert_no_files(tmp_path)


def test_token_ids_beyond_the_vocabulary_are_refused(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(Exception, match=f"token id {VOCABULARY}"):
        measure(tiny_checkpoint, torch.full((1, 8), VOCABULARY))


def test_a_killed_run_continues_with_the_samples_that_are_left(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    class PowerCutError(Exception):
        pass

    tokens = torch.randint(VOCABULARY, (5, 40), generator=torch.Generator().manual_seed(1))
    path = tmp_path / "partial"
    partial = PartialSums(path, {"model": "a"})
    wanted = score_layers(LayerStack(tiny_checkpoint), tokens, slice_samples=2)

    def write_twice_then_die(metrics: HeadInputMetrics) -> None:
        partial.write("layers-0", metrics.to_arrays())
        if metrics.num_tokens == 4 * 40:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        hooks = Hooks(after_slice=write_twice_then_die)
        score_layers(LayerStack(tiny_checkpoint), tokens, slice_samples=2, hooks=hooks)
    stack = LayerStack(tiny_checkpoint)
    steps: list[int] = []
    left = PartialSums(path, {"model": "a"}).stage("layers-0")
    assert left is not None
    hooks = Hooks(earlier=HeadInputMetrics.from_arrays(left), advance=steps.append)
    found = score_layers(stack, tokens, slice_samples=2, hooks=hooks)
    assert stack.counters.layer_applications == stack.num_layers * (stack.num_layers + 1) // 2  # one slice was left
    assert sum(steps) == 5 * (28 + 8)  # progress counts what was done before
    for metric, values in wanted.items():
        np.testing.assert_array_equal(found[metric], values)


@pytest.mark.parametrize("stage", ["channels", "layers-0", "layers-1"])
def test_a_run_killed_in_any_stage_gives_the_same_scores(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    class PowerCutError(Exception):
        pass

    tokens = torch.randint(VOCABULARY, (5, 40), generator=torch.Generator().manual_seed(1))
    request = LayerRequest(removals=1, widths={"ffn": (24,)})
    path = tmp_path / "partial"

    def run() -> Scores:
        return measure(
            tiny_checkpoint,
            tokens,
            Compute(memory_bytes=SMALL_BYTES),
            request=request,
            partial_file=path,
        )

    with monkeypatch.context() as patch:
        patch.setattr(PartialSums, "write", lambda *_args: None)
        wanted = run()
    write = PartialSums.write

    def write_then_die(partial: PartialSums, name: str, arrays: Any) -> None:
        write(partial, name, arrays)
        if name == stage:
            raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(PartialSums, "write", write_then_die)
        with pytest.raises(PowerCutError):
            run()
    left = PartialSums(path, {}).stage(stage)
    assert left is not None
    found = run()
    assert json.loads(found.metadata["counters"]) != json.loads(wanted.metadata["counters"])  # not all was run again
    assert found.metadata["removed_layers"] == wanted.metadata["removed_layers"]
    for table in ("layer", "variants", "units", "energies"):
        for name, values in getattr(wanted, table).items():
            np.testing.assert_array_equal(getattr(found, table)[name], values, err_msg=name)
    assert not path.exists()


def test_an_interrupted_run_on_other_inputs_is_not_continued(tmp_path: Path) -> None:
    PartialSums(tmp_path / "partial", {"model_fingerprint": "old"}).write("x", {"sums": np.zeros(1)})
    with pytest.raises(InputChangedError, match="another model_fingerprint: 'old' then, 'new' now"):
        PartialSums(tmp_path / "partial", {"model_fingerprint": "new"})


@pytest.mark.parametrize("extra", [["--iterative", "1"], ["--layers", "0-3"], ["--variants", "ffn=50%"]])
def test_the_command_keeps_and_checks_the_sums_of_an_interrupted_run(
    tiny_folder: Path, text_file: Path, tmp_path: Path, extra: list[str]
) -> None:
    left_over = tmp_path / "s.safetensors.partial-sums"
    PartialSums(left_over, {"model_fingerprint": "another"}).write("x", {"sums": np.zeros(1)})
    result = score(tiny_folder, text_file, tmp_path / "s.safetensors", *extra)
    assert result.exit_code == 4
    assert str(left_over) in result.stderr.replace("\n", "")
    assert score(tiny_folder, text_file, tmp_path / "s.safetensors", *extra, "--overwrite").exit_code == 0


def test_bfloat16_ranks_layers_as_float32_does(tiny_checkpoint: Checkpoint, text_file: Path) -> None:
    tokens = sample_windows(
        load_tokenizer(tiny_checkpoint.folder), read_documents([text_file]), num_samples=4, sequence_length=40
    )
    wide, narrow = (measure(tiny_checkpoint, tokens, Compute(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    for metric in ("mse", "nmse", "cosine", "kl"):
        np.testing.assert_allclose(narrow.layer[metric], wide.layer[metric], rtol=0.1)


def test_the_prediction_of_work_reads_no_weights(tiny_checkpoint: Checkpoint) -> None:
    stack = open_stack(tiny_checkpoint, sequence_length=40)
    work = predict_work(stack, layer_samples=4, channel_samples=4, sequence_length=40)
    assert work.layer_applications == 28 + 7
    assert stack.counters.weight_bytes_read == 0
