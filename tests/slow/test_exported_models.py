"""Graphs in the runtimes that they are for: the same tokens and answers as torch, and what runs and compares them."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import samples
import tiny
import torch
from PIL import Image
from tiny import Tolerance
from torch.export.passes import move_to_device_pass
from torch.testing import assert_close
from transformers import AutoConfig, ViTImageProcessorPil
from typer.testing import CliRunner

import vitprune
from vitprune.cli import app
from vitprune.recipe.pruning_spec import PruningSpec

FLOAT32 = Tolerance(rtol=1e-4, atol=5e-5)
HALF = Tolerance(rtol=0.0, atol=5e-2)
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
ONE_STAGE = PruningSpec(before_blocks=[3], thresholds=[0.12])
# what a script without torch needs
RUNTIME = ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime", "flatbuffers", "google", "packaging")


def pruned(family: str, spec: PruningSpec = ONE_STAGE) -> Any:
    return vitprune.prune_(tiny.build(family), tiny.spec_for(family, spec)).eval()


def same(model: Any, exported: vitprune.ExportedModel, family: str, tolerance: Tolerance = FLOAT32) -> None:
    """A graph that was traced from one batch serves any other."""
    x = tiny.images(7)
    with torch.no_grad(), vitprune.trace(model) as here:
        expected = tiny.answer(model(x))
    kept = here.kept_patches
    assert kept.min() < kept.max(), "all images keep as many: this test would see nothing"
    for batch in (slice(None), slice(2, 3), slice(4, 7)):
        with vitprune.trace(exported.model) as there:
            answers = tiny.answer(exported.model(x[batch]))
        assert_close(answers.to(expected.dtype), expected[batch], **tolerance)
        assert torch.equal(there.kept_patches, kept[batch])
        assert torch.equal(there.macs, here.macs[batch])
        for ours, theirs in zip(there.merged_into, here.merged_into, strict=True):
            assert torch.equal(ours, theirs[batch])


@pytest.mark.parametrize("family", ["deit", "dinov2-registers", "dinov3", "beit", "data2vec", "siglip"])
def test_onnx_of_every_kind_of_family(tmp_path: Path, family: str) -> None:
    model = pruned(family)
    same(model, vitprune.export(model, tmp_path / "out", tells_patches=True), family)


@pytest.mark.parametrize(
    "spec",
    [tiny.POLICIES["as-vit"], tiny.POLICIES["top-k-merge"].model_copy(update={"min_tokens": 3}), tiny.POLICIES["tome"]],
    ids=["leave", "top-k", "tome"],
)
def test_onnx_of_other_policies(tmp_path: Path, spec: PruningSpec) -> None:
    model, x = pruned("dinov2", spec), tiny.images(5)
    exported = vitprune.export(model, tmp_path / "out")
    with torch.no_grad(), vitprune.trace(model) as here:
        expected = model(x).logits
    with vitprune.trace(exported.model) as there:
        assert_close(exported.model(x).logits, expected, **FLOAT32)
    assert torch.equal(there.macs, here.macs)


@pytest.mark.parametrize("to", ["pt2", "openvino"])
def test_other_formats(tmp_path: Path, to: Any) -> None:
    model = pruned("vit")
    exported = vitprune.export(model, tmp_path / "out", to=to, tells_patches=True)
    same(model, exported, "vit")
    same(model, vitprune.ExportedModel.load(tmp_path / "out" / exported.info.file), "vit")


def test_half_precision_by_torch_and_its_script(tmp_path: Path) -> None:
    model, x = pruned("vit"), tiny.images(3)
    exported = vitprune.export(model, tmp_path / "out", to="pt2", dtype="bfloat16", processor=PROCESSOR)
    with torch.no_grad():
        assert_close(
            exported.model(x).logits.float(), copy.deepcopy(model).bfloat16()(x.bfloat16()).logits.float(), **HALF
        )
    Image.fromarray(np.zeros((40, 52, 3), np.uint8)).save(tmp_path / "black.png")
    command = [sys.executable, str(tmp_path / "out" / "run.py"), str(tmp_path / "black.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "black.png"))


@pytest.mark.parametrize("score", ["redundancy", "head-weighted-class-attention"])
def test_fixed_tokens_have_shapes_known_beforehand(tmp_path: Path, score: Any) -> None:
    """As CUDA graphs need it: nothing that the host would wait for, and nothing that is left on the CPU."""
    model, x = pruned("vit", PruningSpec(before_blocks=[2, 3], thresholds=[0.1, 0.12], score=score)), tiny.images(5)
    exported = vitprune.export(model, tmp_path / "out", to="pt2", tokens="fixed", kept=[40, 20])
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    # on a device without values a number that depends on them can't be read
    elsewhere = move_to_device_pass(program, "meta").module()(pixel_values=x.to("meta"))
    assert elsewhere["logits"].shape == (5, 5)
    whole = torch.compile(
        torch.export.load(tmp_path / "out" / "model.pt2").module(), backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        found = whole(pixel_values=x)
    assert_close(found["logits"], exported.session(x)["logits"], **FLOAT32)
    assert found["kept_tokens"].tolist() == [[41, 21]] * 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler, which AOTInductor needs")
def test_aot_inductor_compiles_a_pt2_file(tmp_path: Path) -> None:
    model, x = pruned("vit"), tiny.images(7)
    vitprune.export(model, tmp_path / "out", to="pt2")
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler talks about itself
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
        compiled: Any = torch._inductor.aoti_load_package(package)
    with torch.no_grad(), vitprune.trace(model) as here:
        expected = model(x).logits
    kept = here.kept_patches + 1
    assert kept.min() < kept.max(), "all images keep as many: this test would see nothing"
    for batch in (slice(None), slice(2, 3), slice(4, 7)):
        found = compiled(pixel_values=x[batch])
        assert_close(found["logits"], expected[batch], **FLOAT32)
        assert torch.equal(found["kept_tokens"], kept[batch])


def test_plain_torch_export_takes_a_pruned_model() -> None:
    model, x = pruned("vit"), tiny.images(6)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (), {"pixel_values": x[:2]}, dynamic_shapes=shapes)
    with torch.no_grad():
        assert_close(program.module()(pixel_values=x)["logits"], model(x).logits, **FLOAT32)
    fixed = pruned("vit", tiny.POLICIES["top-k-merge"])
    with pytest.raises(ValueError, match="select: top-k keeps fixed numbers of tokens"):
        torch.export.export(fixed, (), {"pixel_values": x[:2]}, dynamic_shapes=shapes)


@pytest.mark.parametrize("patches", [None, 49], ids=["as they are", "found at another size"])
def test_any_size(tmp_path: Path, patches: int | None) -> None:
    model = pruned("dinov2", ONE_STAGE.model_copy(update={"patches": patches}))
    exported = vitprune.export(model, tmp_path / "out", any_size=True)
    for height, width in ((32, 32), (48, 32), (24, 40)):
        x = torch.randn(3, 3, height, width)
        with torch.no_grad(), vitprune.trace(model) as here, vitprune.trace(exported.model) as there:
            assert_close(exported.model(x).logits, model(x).logits, **FLOAT32)
        assert_close(there.macs, here.macs)
        assert_close(there.dense_macs, here.dense_macs)


def test_another_size_than_the_processors(tmp_path: Path) -> None:
    """What is written beside the graph gives what the graph takes."""
    model, pixels = pruned("dinov2"), np.random.default_rng(0).integers(0, 255, (40, 52, 3)).astype(np.uint8)
    exported = vitprune.export(model, tmp_path / "out", image_size=48, processor=PROCESSOR)
    assert exported.info.image == (3, 48, 48)
    logits = exported(Image.fromarray(pixels))["logits"]
    x = ViTImageProcessorPil(size={"height": 48, "width": 48})(Image.fromarray(pixels), return_tensors="pt")
    with torch.no_grad():
        assert_close(logits, model(x["pixel_values"]).logits, **FLOAT32)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    command = [sys.executable, str(tmp_path / "out" / "run.py"), str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_that_gives_out_hidden_states(tmp_path: Path) -> None:
    """The graph doesn't, and what is saved beside it doesn't say so."""
    model = pruned("deit")
    model.config.output_hidden_states = True
    exported = vitprune.export(model, tmp_path / "out", tells_patches=True)
    assert model.config.output_hidden_states
    assert not AutoConfig.from_pretrained(tmp_path / "out").output_hidden_states
    model.config.output_hidden_states = False  # which takes the last block whole
    same(model, exported, "deit")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned classifier whose report says how many patches images keep."""
    folder = tmp_path_factory.mktemp("exported")
    samples.write_checkpoint(folder / "checkpoint", "vit")
    samples.write_data(folder / "data")
    (folder / "recipe.yaml").write_text(
        "version: 1\nmodel: {checkpoint: checkpoint}\ndata: {path: data}\npruning: {before_blocks: [3]}\n"
        "budget: {macs: 70%}\ncalibration: {images: 24, batch_size: 8}\n"
        f"evaluate: {{batch_sizes: [2], repeats: 2}}\noutput: {{path: {folder / 'pruned'}}}\n"
    )
    invoked(["apply", str(folder / "recipe.yaml")])
    return folder / "pruned"


def invoked(words: list[str]) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    output = checkpoint.parent / "onnx"
    said = invoked(["export", str(checkpoint), "--output", str(output)])
    assert "adaptive tokens" in said
    assert "with other numbers of tokens" not in said
    return output


def test_the_folder_is_whole_and_reads_as_a_checkpoints(checkpoint: Path, exported: Path) -> None:
    names = ["README.md", "config.json", "export.json", "model.onnx", "preprocessor_config.json", "run.py"]
    assert sorted(path.name for path in exported.iterdir()) == names
    assert AutoConfig.from_pretrained(exported).id2label == AutoConfig.from_pretrained(checkpoint).id2label
    session: Any = onnxruntime.InferenceSession(exported / "model.onnx")
    assert [one.name for one in session.get_inputs()] == ["pixel_values"]
    assert [one.name for one in session.get_outputs()] == ["logits", "kept_tokens"]
    result = CliRunner().invoke(app, ["export", str(checkpoint), "--output", str(exported)])
    assert result.exit_code == 1
    assert "exists; choose another folder, or overwrite it" in result.output
    result = CliRunner().invoke(app, ["export", str(checkpoint), "--kept", "q95", "--output", str(exported)])
    assert result.exit_code == 1
    assert "add --tokens fixed" in result.output


def test_the_script_needs_neither_torch_nor_vitprune(tmp_path: Path, exported: Path) -> None:
    site = Path(np.__file__).parents[1]
    for name in RUNTIME:
        if (site / name).exists():
            (tmp_path / "site" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "site" / name).symlink_to(site / name)
    pictures, runner = [], vitprune.ExportedModel.load(exported)
    for seed in range(10):
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 52, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
        pictures.append(Image.fromarray(pixels))
    answers = runner(pictures)["logits"].argmax(-1).tolist()
    names: Any = runner.model.config.id2label
    command = [sys.executable, "-S", str(exported / "run.py"), *(str(tmp_path / f"{i}.png") for i in range(10))]
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()] == [names[i] for i in answers]
    missing = subprocess.run(
        [sys.executable, "-S", "-c", "import torch"], env=environment, capture_output=True, check=False
    )
    assert missing.returncode != 0, "torch was there all the time"


def test_evaluate_and_bench(tmp_path: Path, checkpoint: Path, exported: Path) -> None:
    recipe = checkpoint.parent / "recipe.yaml"
    graph = str(exported / "model.onnx")
    invoked(["evaluate", graph, str(recipe), "--output", str(tmp_path / "graph"), "--quiet"])
    invoked(["evaluate", str(checkpoint), str(recipe), "--output", str(tmp_path / "torch"), "--quiet"])
    ours, theirs = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("graph", "torch"))
    assert ours["comparison"]["macs"] == theirs["comparison"]["macs"]
    assert ours["comparison"]["metrics"] == theirs["comparison"]["metrics"]
    assert ours["comparison"]["kept"] == theirs["comparison"]["kept"]
    assert ours["environment"]["runtime"].startswith("onnxruntime ")
    assert theirs["environment"]["runtime"] is None
    assert f'ExportedModel.load("{exported.name}")' in html.unescape((tmp_path / "graph" / "report.html").read_text())
    options = ["--batch-size", "2", "--repeats", "1", "--output", str(tmp_path / "bench")]
    said = invoked(["bench", graph, "--data", str(checkpoint.parent / "data"), *options])
    assert "32 px, float32, onnx" in said
    found = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert 0 < found["cases"][0]["macs_ratio"] < 1
    refused = CliRunner().invoke(app, ["bench", graph, "--macs", "50%"])
    assert refused.exit_code == 1
    assert "is a graph, measured as it is; leave --macs out" in refused.output


def test_bench_of_images_that_are_not_square(tmp_path: Path) -> None:
    wide = ViTImageProcessorPil(size={"height": 32, "width": 48})
    exported = vitprune.export(pruned("dinov2"), tmp_path / "wide", processor=wide)
    assert exported.info.image == (3, 32, 48)
    options = ["--batch-size", "2", "--repeats", "1", "--output", str(tmp_path / "bench")]
    invoked(["bench", str(tmp_path / "wide" / "model.onnx"), *options])
    found = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert 0 < found["cases"][0]["macs_ratio"] < 1


def test_fixed_tokens_of_the_report_and_int8(tmp_path: Path, checkpoint: Path) -> None:
    model = vitprune.load(checkpoint)
    report = json.loads((checkpoint / "report.json").read_text())
    kept = round(report["comparison"]["kept"][0]["kept"]["mean"])
    options = ["--tokens", "fixed", "--dtype", "int8", "--output", str(tmp_path / "fixed")]
    assert "fixed tokens" in invoked(["export", str(checkpoint), *options])
    found = vitprune.ExportedModel.load(tmp_path / "fixed")
    assert found.info.kept == (kept,)
    x = tiny.images(5)
    with vitprune.trace(found.model) as there, torch.no_grad():
        answers, expected = found.model(x).logits, model(x).logits
    assert (there.kept_patches == kept).all()
    assert answers.shape == expected.shape
    operators = (tmp_path / "fixed" / "model.onnx").read_bytes()
    assert b"MatMulInteger" in operators or b"DynamicQuantizeMatMul" in operators
    told = invoked(["export", str(checkpoint), "--tokens", "fixed", "--output", str(tmp_path / "float")])
    difference = re.search(r"answers are within (\S+) of torch's", told)
    assert difference is not None
    assert float(difference[1]) < 1e-3, "compared with another policy"
    (checkpoint / "report.json").rename(tmp_path / "report.json")
    try:
        refused = CliRunner().invoke(app, ["export", str(checkpoint), *options[:2], "--output", str(tmp_path / "no")])
    finally:
        (tmp_path / "report.json").rename(checkpoint / "report.json")
    assert refused.exit_code == 1
    assert "has no report.json that says how many patches" in refused.output


def test_a_dense_model_and_half_precision(tmp_path: Path) -> None:
    dense, x = tiny.build("beit"), tiny.images(3)
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "mine.txt").touch()
    with pytest.raises(ValueError, match="isn't overwritten"):
        vitprune.export(dense, tmp_path / "dense", to="pt2", overwrite=True)
    (tmp_path / "dense" / "mine.txt").unlink()
    vitprune.export(dense, tmp_path / "dense", to="pt2", overwrite=True)
    exported = vitprune.export(dense, tmp_path / "dense", dtype="float16", processor=PROCESSOR, overwrite=True)
    assert not (tmp_path / "dense" / "model.pt2").exists()
    assert exported.info.tokens == "dense"
    with torch.no_grad():
        assert_close(exported.model(x).logits.float(), dense(x).logits, **HALF)
    assert dense.dtype == torch.float32
    assert dense.config._attn_implementation == "sdpa"
