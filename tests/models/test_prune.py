"""`prune_` and `restore_`: what they refuse, compute and leave alone. What models compute: tests/contract."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Tolerance
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import vitprune
from vitprune.models import block, context
from vitprune.models.module import is_pruned, pruning_of
from vitprune.models.structure import examine
from vitprune.pruning.layout import KEY_ALIGNMENT
from vitprune.pruning.learning import masked
from vitprune.recipe.schema import PruningSpec

EXACT = Tolerance(rtol=0.0, atol=0.0)
# the same images in other batches: sums in another order
FLOAT32 = Tolerance(rtol=1e-5, atol=1e-5)


def pruned(policy: str = "as-vit", family: str = "vit") -> PreTrainedModel:
    return vitprune.prune_(tiny.build(family), tiny.spec_for(family, tiny.POLICIES[policy]))


def swin() -> PreTrainedModel:
    config = SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    return SwinForImageClassification(config)


# --- prune_ and restore_ ---


@pytest.mark.parametrize("build", [swin, lambda: nn.Linear(2, 2)], ids=["swin", "no transformers model"])
def test_what_is_no_plain_vit_is_refused_with_a_list_of_what_works(build: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match=r"supported are ViTs of the model types vit, .*dinov2, "):
        vitprune.prune_(build(), PruningSpec())


def test_a_stage_outside_the_blocks_is_refused_and_changes_nothing() -> None:
    model = tiny.build("vit")
    before = [name for name, _ in model.named_modules()], model.config.to_dict()
    with pytest.raises(ValueError, match=r"stage 6 is outside the model's 6 blocks \(1 to 5\)"):
        vitprune.prune_(model, PruningSpec(before_blocks=[2, 6]))
    with pytest.raises(ValueError, match="has 3 numbers for 5 stages in 6 blocks"):
        vitprune.prune_(model, PruningSpec(before_blocks="every", thresholds=[0.1, 0.2, 0.3]))
    assert ([name for name, _ in model.named_modules()], model.config.to_dict()) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not is_pruned(model)


def test_a_model_is_pruned_once() -> None:
    model = pruned()
    with pytest.raises(ValueError, match=r"ViTForImageClassification is pruned already; call vitprune\.restore_"):
        vitprune.prune_(model, PruningSpec())
    vitprune.restore_(model)
    assert is_pruned(vitprune.prune_(model, PruningSpec()))


def test_a_part_of_a_pruned_model_is_pruned_already() -> None:
    model = pruned(family="deit").base_model
    assert isinstance(model, PreTrainedModel)
    with pytest.raises(ValueError, match="pruned already"):
        vitprune.prune_(model, PruningSpec())


@pytest.mark.parametrize(
    "use",
    [vitprune.restore_, pruning_of, lambda model: vitprune.trace(model).__enter__()],
    ids=["restore", "of", "trace"],
)
def test_a_dense_model_has_nothing_to_restore_or_trace(use: Callable[[PreTrainedModel], object]) -> None:
    with pytest.raises(ValueError, match=r"ViTForImageClassification isn't pruned; call vitprune\.prune_"):
        use(tiny.build("vit"))


def test_restoring_gives_back_the_attention_that_was_there() -> None:
    model = tiny.build("vit")
    model.set_attn_implementation("eager")
    vitprune.restore_(vitprune.prune_(model, tiny.POLICIES["as-vit"]))
    assert model.config._attn_implementation == "eager"
    assert "quantization_config" not in vars(model.config)


@pytest.mark.parametrize("option", [{"output_attentions": True}, {"attention_mask": torch.ones(2, 65)}], ids=str)
def test_what_a_pruned_model_cannot_do_is_refused_with_the_way_out(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"call vitprune\.restore_\(model\) for the dense model"):
        pruned()(tiny.images(2), **option)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace:DeprecationWarning", "ignore:`is_gradient_checkpointing`:FutureWarning"
)
def test_a_trace_of_one_image_is_no_graph_of_others() -> None:
    model = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["as-vit"])
    with torch.no_grad(), pytest.raises(ValueError, match=r"can't be traced.*torch\.export and vitprune\.export"):
        torch.jit.trace(model, (tiny.inputs("vit", 2)["pixel_values"],), strict=False)


def test_a_model_that_trains_is_not_exported() -> None:
    model = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["as-vit"]).train()
    with torch.no_grad(), pytest.raises(ValueError, match=r"call model\.eval\(\) before"):
        torch.export.export(model, (tiny.inputs("vit", 2)["pixel_values"],), strict=False)


def test_copies_that_one_process_makes_for_its_devices_are_refused() -> None:
    model: Any = vitprune.prune_(tiny.build("vit"), tiny.POLICIES["as-vit"])
    model.vit = model.vit._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"DataParallel.*accelerate launch"):
        tiny.forward(model, tiny.inputs("vit", 2))


@pytest.mark.parametrize("policy", ["as-vit", "random-leave"])
def test_a_model_whose_attention_was_changed_says_so(policy: str) -> None:
    model = pruned(policy)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention"):
        model(tiny.images(2))


# --- what nobody reads isn't computed ---

CLASS_HEADS = [("vit", 1), ("deit", 2), ("vit-msn", 1), ("vivit", 1), ("ast", 2)]


class Rows:
    """How many rows each linear layer of the last block gets, call by call."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.seen: list[int] = []
        for module in examine(model).blocks[-1].modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda module, args, output: self.seen.append(args[0][..., 0].numel()))


@pytest.mark.parametrize(("family", "read"), CLASS_HEADS)
@pytest.mark.parametrize("policy", tiny.REPRESENTATIVE)
@torch.no_grad()
def test_of_the_last_block_a_class_head_gets_what_it_reads(family: str, read: int, policy: str) -> None:
    model, x = pruned(policy, family).eval(), tiny.inputs(family, 3)
    rows = Rows(model)
    ours = tiny.answer(tiny.forward(model, x))
    queries_keys_values = rows.seen[:3]
    assert min(queries_keys_values) > 3 * read
    # for those it reads from their queries on; all others are left out
    assert rows.seen[3:] == [3 * read] * (len(rows.seen) - 3)
    assert len(rows.seen) >= 3 + 6
    in_full = tiny.answer(tiny.forward(model, x, output_hidden_states=True))
    assert_close(ours, in_full, **FLOAT32)


@pytest.mark.parametrize("where", ["call", "config", "selection", "backbone", "training"])
@torch.no_grad()
def test_whoever_else_reads_the_patches_gets_them(where: str) -> None:
    model, x = pruned(), tiny.images(2)
    rows = Rows(model)
    match where:
        case "call":
            hidden_states = model(x, output_hidden_states=True).hidden_states
            assert [h.shape for h in hidden_states] == [(2, 65, 48)] * 7
        case "config":
            model.config.output_hidden_states = True
            assert model(x).hidden_states[-1].shape == (2, 65, 48)
        case "selection":
            assert model(x, output_hidden_states=[-1]).hidden_states[-1].shape == (2, 65, 48)
        case "backbone":
            model(x)  # leaves nothing behind
            rows.seen.clear()
            backbone: Any = model.get_submodule("vit")
            assert backbone(x).last_hidden_state.shape == (2, 65, 48)
        case "training":
            model.train()(x)
    assert len(set(rows.seen)) == 1


@torch.no_grad()
def test_a_forward_that_fails_leaves_the_next_ones_alone() -> None:
    model = pruned()
    with pytest.raises(ValueError, match="size"):
        model(torch.zeros(1, 3, 7, 7))
    backbone: Any = model.get_submodule("vit")
    assert backbone(tiny.images(2)).last_hidden_state.shape == (2, 65, 48)


def test_macs_count_the_last_block_as_it_is_executed() -> None:
    model, x = pruned(), tiny.images(2)
    with torch.no_grad():
        with vitprune.trace(model) as for_head:
            model(x)
        with vitprune.trace(model) as in_full:
            model(x, output_hidden_states=True)
    with vitprune.trace(model.train()) as in_training:
        model(x)
    assert (for_head.macs < in_full.macs).all()
    assert_close(for_head.macs, in_training.macs.detach())
    cost, tokens = pruning_of(model).cost, 1 + in_full.keep_masks[-1].sum(1).double()
    assert_close(in_full.macs - for_head.macs, cost.block(5, tokens) - cost.pruned_block(5, tokens))


def test_hidden_states_are_dense_sequences_in_a_tuple_too() -> None:
    *_, hidden_states = pruned(family="vit-bare")(tiny.images(2), output_hidden_states=True, return_dict=False)
    assert [h.shape for h in hidden_states] == [(2, 65, 48)] * 7


@torch.no_grad()
def test_what_a_block_gives_out_has_lost_what_leaves_before_the_next() -> None:
    model, rows = tiny.build("vit"), list[int]()
    block = examine(model).blocks[1]
    # a hook that was there before
    block.register_forward_hook(lambda _, args, output: rows.append(output.shape[0] * output.shape[1]))
    model(tiny.images(2))
    with vitprune.trace(vitprune.prune_(model, tiny.POLICIES["as-vit"])) as trace:
        model(tiny.images(2))
    assert trace.before_blocks[0] == 2
    assert rows[0] == 2 * 65
    kept = int(trace.keep_masks[0].sum()) + 2
    assert kept <= rows[1] < kept + 2 * KEY_ALIGNMENT


@torch.no_grad()
def test_hidden_states_are_those_of_a_model_that_gave_them_out_before() -> None:
    x, spec = tiny.images(2), tiny.POLICIES["as-vit-merge"]
    expected = vitprune.prune_(tiny.build("vit"), spec)(x, output_hidden_states=True).hidden_states
    model = tiny.build("vit")
    model(x, output_hidden_states=True)
    found = vitprune.prune_(model, spec)(x, output_hidden_states=True).hidden_states
    assert_close(found, expected, **EXACT)


# --- what has no good answer still has one ---


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("policy", ["as-vit", "as-vit-merge", "redundancy-merge", "tome"])
def test_not_a_number_goes_through(policy: str, mode: str) -> None:
    # so that the fine-tuner sees a loss that isn't finite, and says so
    with torch.no_grad():
        assert pruned(policy).train(mode == "train")(tiny.images(2) * torch.nan).logits.isnan().all()


def test_one_stage_may_keep_everything_in_training() -> None:
    model = pruned("as-vit").train()
    with torch.no_grad():
        pruning_of(model).levels[1] = -torch.inf
        assert model(tiny.images(3)).logits.isfinite().all()


# --- images of other sizes ---


every_mode = pytest.mark.parametrize("mode", ["eval", "train"])


def at_patches(family: str, patches: int | None, factor: float) -> PreTrainedModel:
    """By attention, with thresholds that were found at so many patches."""
    spec = tiny.POLICIES["as-vit-merge"]
    assert isinstance(spec.thresholds, tuple)
    changes = {"patches": patches, "thresholds": tuple(factor * threshold for threshold in spec.thresholds)}
    return vitprune.prune_(tiny.build(family), tiny.spec_for(family, spec.model_copy(update=changes)))


@torch.no_grad()
@every_mode
@pytest.mark.parametrize("family", ["vit", "siglip-tower"])
def test_at_twice_the_patches_thresholds_of_attention_mean_half_as_much(family: str, mode: str) -> None:
    x, models = tiny.inputs(family, 5), [at_patches(family, 32, 1.0), at_patches(family, None, 0.5)]
    answers = [tiny.answer(tiny.forward(model.train(mode == "train"), x)) for model in models]
    assert_close(*answers, **EXACT)
    other = tiny.answer(tiny.forward(at_patches(family, None, 1.0).train(mode == "train"), x))
    assert not torch.equal(answers[0], other), "patches change nothing: this test would see nothing"


@torch.no_grad()
@every_mode
def test_a_padded_image_counts_its_own_patches(mode: str) -> None:
    """Each image as it is alone, cut to its own patches, with thresholds scaled to these by hand."""
    model, x = at_patches("siglip2", 64, 1.0).train(mode == "train"), tiny.inputs("siglip2", 5)
    with vitprune.trace(model) as together:
        model(**x)
    for index, image in enumerate(tiny.each(x)):
        count = int(image["pixel_attention_mask"].sum())
        cut = {name: values if name == "spatial_shapes" else values[:, :count] for name, values in image.items()}
        by_hand = at_patches("siglip2", None, 64 / count).train(mode == "train")
        with vitprune.trace(by_hand) as alone:
            by_hand(**cut)
        for ours, theirs in zip(together.keep_masks, alone.keep_masks, strict=True):
            assert torch.equal(ours[index, :count], theirs[0])


# --- attention pooling and padded images ---


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("policy", ["as-vit", "random-leave", "redundancy-leave"])
@pytest.mark.parametrize("family", ["siglip-tower", "siglip2-tower"])
def test_attention_pooling_sees_the_kept_patches_only(family: str, policy: str, mode: str) -> None:
    model, x = pruned(policy, family).train(mode == "train"), tiny.inputs(family, 5)
    with torch.no_grad(), vitprune.trace(model) as trace:
        output = model(**x)
    assert not trace.keep_masks[-1].all(), "the policy drops nothing: this test would see nothing"
    pool = model.get_submodule("head")
    for image, mask in enumerate(trace.keep_masks[-1]):
        with torch.no_grad():
            expected = pool(output.last_hidden_state[image, mask][None])[0]
        assert_close(output.pooler_output[image], expected, **FLOAT32)


def test_attention_pooling_counts_whoever_stands_for_a_patch() -> None:
    model = pruned("as-vit-merge", "siglip-tower")
    with torch.no_grad():
        output = model(tiny.images(3))
        expected = model.get_submodule("head")(output.last_hidden_state)
    assert_close(output.pooler_output, expected, **FLOAT32)


def test_outside_a_forward_attention_pooling_is_left_alone() -> None:
    model, x = pruned("as-vit", "siglip-tower"), torch.randn(2, 9, 48)
    with torch.no_grad():
        model(tiny.images(2))
        expected = tiny.build("siglip-tower").get_submodule("head")(x)
        assert_close(model.get_submodule("head")(x), expected, **EXACT)


padded_families = pytest.mark.parametrize("family", ["siglip2", "siglip2-tower"])


@padded_families
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("policy", tiny.POLICIES)
def test_padding_is_never_kept(family: str, policy: str, mode: str) -> None:
    model, x = pruned(policy, family).train(mode == "train"), tiny.inputs(family, 5)
    with torch.no_grad(), vitprune.trace(model) as trace:
        model(**x)
    padding = x["pixel_attention_mask"] == 0
    assert padding.any()
    assert not any((mask & padding).any() for mask in trace.keep_masks)


@padded_families
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("policy", tiny.POLICIES)
def test_padding_is_never_counted(family: str, policy: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # without the published eps, of which there is a share for every token, padding included
    monkeypatch.setattr(masked, "EPS", 0.0)
    model, x = pruned(policy, family).train(mode == "train"), tiny.inputs(family, 5)
    with torch.no_grad(), vitprune.trace(model) as together:
        answers = tiny.answer(model(**x))
    cost = pruning_of(model).cost
    for index, image in enumerate(tiny.each(x)):
        count = int(image["pixel_attention_mask"].sum())
        cut = {name: values if name == "spatial_shapes" else values[:, :count] for name, values in image.items()}
        with torch.no_grad(), vitprune.trace(model) as alone:
            answer = tiny.answer(model(**cut))
        assert_close(answers[index], answer[0], **FLOAT32)
        assert_close(together.macs[index], alone.macs[0], **FLOAT32)
        assert_close(together.dense_macs[index], alone.dense_macs[0], **EXACT)
        assert_close(together.dense_macs[index].item(), float(cost.dense(count, 0)), **EXACT)
        for ours, theirs in zip(together.keep_masks, alone.keep_masks, strict=True):
            assert torch.equal(ours[index, :count], theirs[0])


@padded_families
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_padding_comes_back_as_zeros(family: str, mode: str) -> None:
    model, x = pruned("as-vit", family).train(mode == "train"), tiny.inputs(family, 5)
    backbone = examine(model).backbone
    with torch.no_grad():
        last = backbone(**x).last_hidden_state
    padding = x["pixel_attention_mask"] == 0
    assert padding.any()
    assert not last[padding].any()


def test_a_quantised_model_is_refused() -> None:
    model = tiny.build("vit")
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ValueError, match=r"is quantised \(torchao\); prune the model that it was made from"):
        vitprune.prune_(model, tiny.POLICIES["as-vit"])
    assert model.config.quantization_config == {"quant_method": "torchao"}


def test_models_of_one_config_are_pruned_one_by_one() -> None:
    config: Any = tiny.build("vit").config
    teacher, student = ViTForImageClassification(config).eval(), ViTForImageClassification(config).eval()
    vitprune.prune_(student, tiny.POLICIES["as-vit"])
    assert teacher.config._attn_implementation == "sdpa"
    assert not hasattr(teacher.config, "quantization_config")
    assert student.config._attn_implementation == block.NAME
    # all parts of the student have the same one, as before
    assert {id(module.config) for module in student.modules() if hasattr(module, "config")} == {id(student.config)}


def test_an_encoder_whose_layers_have_a_config_of_their_own_is_pruned() -> None:
    """As in a VisionEncoderDecoderModel made of two models: what one image gives mustn't depend on the batch."""
    encoder = ViTModel(ViTConfig(**tiny.SHAPE), add_pooling_layer=False)
    encoder.config = copy.deepcopy(encoder.config)
    dense = copy.deepcopy(encoder).eval()
    x = tiny.images(3)
    vitprune.prune_(encoder.eval(), tiny.POLICIES["as-vit"])
    with torch.no_grad():
        together, alone = encoder(x).last_hidden_state[:1], encoder(x[:1]).last_hidden_state
    assert_close(together, alone, **FLOAT32)
    vitprune.restore_(encoder)
    configs: list[Any] = [module.config for module in encoder.modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    with torch.no_grad():
        assert_close(encoder(x).last_hidden_state, dense(x).last_hidden_state, **EXACT)


def logits(model: PreTrainedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).logits


def test_two_threads_may_run_one_model() -> None:
    model, x = pruned("as-vit-merge"), tiny.images(8)

    def run(image: Tensor) -> tuple[Tensor, Tensor]:
        with vitprune.trace(model) as trace:
            return logits(model, image), trace.macs

    images = x.split(1)
    expected = [run(image) for image in images]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, images * 4))
    for ours, theirs in zip(results, expected * 4, strict=True):
        assert_close(ours, theirs, **EXACT)


def test_a_failing_forward_leaves_nothing_behind() -> None:
    model, x = pruned("as-vit"), tiny.images(2)
    expected = logits(model, x)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(torch.zeros(1, 3, 8, 8))
    assert_close(logits(model, x), expected, **EXACT)
    for mask in ({"attention_mask": torch.ones(2, 65)}, {"attn_mask": torch.ones(65, 65)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="no attention_mask"):
            model(x, **mask)
    assert_close(logits(model, x), expected, **EXACT)
    assert context.current() == context.Context()


def test_a_state_dict_brings_back_thresholds() -> None:
    model = pruned("as-vit")
    other = vitprune.prune_(tiny.build("vit"), PruningSpec(**tiny.AS_VIT, dropped="leave"))
    other.load_state_dict(model.state_dict())
    assert_close(logits(other, tiny.images(2)), logits(model, tiny.images(2)), **EXACT)


@pytest.mark.parametrize("training", [False, True])
def test_a_forgotten_calibration_is_said_once_and_not_saved(tmp_path: Path, training: bool) -> None:
    model = vitprune.prune_(tiny.build("vit"), PruningSpec()).train(training)
    with pytest.warns(UserWarning, match=r"nothing is pruned.*call vitprune\.calibrate"):
        model(tiny.images(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(tiny.images(2))
    for save in (model.save_pretrained, lambda path: vitprune.save(model, path)):
        with pytest.raises(ValueError, match=r"never found.*vitprune\.calibrate.*vitprune\.restore_"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    vitprune.calibrate(model, [tiny.images(8)], 0.8, progress=False)
    vitprune.save(model, tmp_path / "out")
    # all of the MACs is a budget, too
    whole = vitprune.prune_(tiny.build("vit"), PruningSpec())
    vitprune.calibrate(whole, [tiny.images(8)], 1.0, progress=False)
    vitprune.save(whole, tmp_path / "whole")


def with_levels(level: float) -> Any:
    model = vitprune.prune_(tiny.build("vit"), PruningSpec(before_blocks=[2, 4], thresholds=[0.01, 0.01])).eval()
    with torch.no_grad():
        pruning_of(model).levels.fill_(level)
    return model


@pytest.mark.parametrize("level", [0.01, -1.0], ids=["pruned", "nothing leaves"])
def test_a_forward_that_was_interrupted_leaves_nothing_behind(level: float) -> None:
    """Ctrl-C passes by the hooks that torch always calls."""
    model, x = with_levels(level), tiny.images(3)

    def interrupt(*_: Any) -> None:
        handle.remove()
        raise KeyboardInterrupt

    handle = examine(model).blocks[3].register_forward_pre_hook(interrupt)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(x)
        bare = model.vit(x).last_hidden_state
        assert bare.shape == (3, tiny.PATCHES + 1, tiny.SHAPE["hidden_size"])
        assert_close(bare, model.vit(x).last_hidden_state, **EXACT)
    assert context.current() == context.Context()


def data2vec_with_one_table() -> Any:
    config = Data2VecVisionConfig(**tiny.BEIT, use_shared_relative_position_bias=True)
    return tiny._with_positions(Data2VecVisionForImageClassification(config))


@pytest.mark.parametrize("family", ["beit", "beit-shared", "data2vec", "data2vec-shared", "vit", "dinov2"])
def test_positions_that_fit_are_not_interpolated_again(family: str) -> None:
    """Blocks of BEiT would stretch their table to the rows that are left, and so would Data2Vec's encoder."""
    model = data2vec_with_one_table() if family == "data2vec-shared" else tiny.build(family)
    vitprune.prune_(model, PruningSpec(before_blocks=[2, 4], thresholds=[0.1, 0.12])).eval()
    x = tiny.images(3)
    with vitprune.trace(model) as seen, torch.no_grad():
        expected = tiny.answer(model(x))
    assert seen.ratio < 0.95
    with torch.no_grad():
        assert_close(tiny.answer(model(x, interpolate_pos_encoding=True)), expected, **FLOAT32)


class OwnForImageClassification(ViTForImageClassification):
    """Reads what the class of transformers does not."""

    def forward(self, pixel_values: Any, **unused: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole: Any = self.vit(pixel_values).last_hidden_state
        return self.classifier(whole[:, 1:].mean(1))


def test_a_head_of_ones_own_reads_everything() -> None:
    config: Any = tiny.build("vit").config
    model = OwnForImageClassification(config).eval()
    assert examine(model).cost.read is None
    vitprune.prune_(model, PruningSpec(before_blocks=[2, 4], thresholds=[0.01, 0.02]))
    with torch.no_grad():
        logits: Any = model(tiny.images(2))
        expected = model.classifier(model.vit(tiny.images(2)).last_hidden_state[:, 1:].mean(1))
    assert_close(logits, expected, **EXACT)
    renamed: Any = type("OwnViT", (ViTForImageClassification,), {})
    assert examine(renamed(config)).cost.read == 1


def test_a_hook_on_the_backbone_sees_all_that_it_gives_out() -> None:
    model: Any = pruned().eval()
    for part in (model.vit, examine(model).final_norm):
        seen: list[Any] = []
        handle = part.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model(tiny.images(2))
        handle.remove()
        (found,) = seen
        assert (found if isinstance(found, Tensor) else found[0]).shape[1] == tiny.PATCHES + 1


@pytest.mark.parametrize("place", ["a block", "inside a block", "the embeddings"])
@pytest.mark.parametrize("inner", ["pruned", "nothing leaves", "fails", "refuses"])
def test_a_forward_inside_another_leaves_it_alone(place: str, inner: str) -> None:
    model, x = pruned().eval(), tiny.images(3)
    other = with_levels(-1.0 if inner == "nothing leaves" else 0.01)
    with torch.no_grad():
        expected, alone = model(x).logits, other(x).logits
        found: list[Tensor] = []

        def ask(*_: Any) -> None:
            if inner == "fails":
                with pytest.raises(RuntimeError):  # as transformers' own does
                    other(x[:0])
            elif inner == "refuses":
                with pytest.raises(ValueError, match="gives out no attention maps"):
                    other(x, output_attentions=True)
            else:
                found.append(other(x).logits)

        block: Any = examine(model).blocks[3]
        parts = {"a block": block, "inside a block": block.layernorm_before, "the embeddings": model.vit.embeddings}  # type: ignore[union-attr]
        parts[place].register_forward_hook(ask)
        assert_close(model(x).logits, expected, **EXACT)
        assert all(torch.equal(one, alone) for one in found)
    assert context.current() == context.Context()


def test_an_interrupted_model_that_is_no_more_is_forgotten() -> None:
    first, second, x = with_levels(0.01), with_levels(0.01), tiny.images(2)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    examine(first).blocks[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        first(x)
    gone = weakref.ref(first.vit)
    del first
    gc.collect()
    with torch.no_grad():
        second(x)
    gc.collect()
    assert gone() is None
    assert context.current() == context.Context()
