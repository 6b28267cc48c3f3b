"""What people combine with a pruned model, on the quickstart's ViT at 60 %: torchao's int8, Trainer, PEFT's LoRA.

    PYTHONPATH=.venv/torchao python benchmarks/combinations.py WORKDIR

Needs torchao, which `make install` puts into a folder of its own, and peft. Four minutes on two cores.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]
from transformers import PreTrainedModel, Trainer, TrainingArguments

import vitprune

BUDGET, STEPS, BATCH = 0.6, 79, 32


def report(name: str, dense: PreTrainedModel, model: PreTrainedModel, images: vitprune.Images) -> None:
    found = vitprune.compare(dense, model, images, progress=False)
    accuracy = found.metrics["accuracy"]
    print(
        f"{name}: accuracy {accuracy.pruned:.2%} (dense {accuracy.dense:.2%}), agreement {found.agreement:.2%}, "
        f"MACs {found.macs.ratio:.2%}",
        flush=True,
    )


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def train(model: Any, rows: list[dict[str, Any]], held_out: vitprune.Images, folder: Path, rate: float) -> None:
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=8,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    callback = vitprune.TrainerCallback(BUDGET, held_out)
    Trainer(model=model, args=settings, train_dataset=rows, callbacks=[callback]).train()  # pyright: ignore[reportArgumentType]
    model.eval()


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    recipe = vitprune.load_recipe("recipes/quickstart.yaml")
    processor, dense = vitprune.load_processor(recipe.model.checkpoint), vitprune.load(recipe.model.checkpoint)
    labels: Any = dense.config.id2label
    train_images, test_images = (
        vitprune.load_images(recipe.data, split, processor, id2label=labels)
        for split in (recipe.data.train, recipe.data.eval)
    )
    rest, held_out = train_images.holdout(500, 0)
    base = vitprune.prune_(copy.deepcopy(dense), {"before_blocks": [1, 5]})
    vitprune.calibrate(base, rest.sample(256, 0), BUDGET, progress=False)
    report("calibrated", dense, base, test_images)

    vitprune.save(base, folder / "pruned", overwrite=True)
    before, after = quantized(base), quantized(vitprune.load(folder / "pruned"))
    x = test_images.sample(256, 1).pixels()
    with torch.no_grad():
        with vitprune.trace(before) as kept:
            expected = before(x).logits
        with vitprune.trace(after) as kept_after:
            same = torch.equal(after(x).logits, expected)
    decisions = all(map(torch.equal, kept.keep_masks, kept_after.keep_masks))
    print(f"int8, saved and loaded: answers equal {same}, decisions equal {decisions}")
    report("int8", dense, after, test_images)

    batches = rest.loader(64)
    rows = [
        {"pixel_values": pixels, "labels": int(label)}
        for batch in batches
        for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]
    by_trainer = copy.deepcopy(base)
    train(by_trainer, rows, held_out, folder / "trainer", 2e-5)
    report("Trainer with the callback", dense, by_trainer, test_images)
    ours = copy.deepcopy(base)
    spec = {"steps": STEPS, "learning_rate": 2e-5, "augmentation": "none", "losses": {"task": 1.0, "distillation": 0.0}}
    vitprune.finetune(ours, copy.deepcopy(dense), rest, spec, BUDGET, progress=False)
    vitprune.scale_to_budget(ours, held_out, BUDGET, progress=False)
    report("vitprune.finetune, same steps and loss", dense, ours, test_images)

    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["vitprune"])
    adapted = get_peft_model(vitprune.load(folder / "pruned"), lora)
    train(adapted, rows, held_out, folder / "lora", 1e-3)
    base_model: Any = adapted.get_base_model()
    report("LoRA", dense, base_model, test_images)
    adapted.save_pretrained(str(folder / "adapter"))
    again = PeftModel.from_pretrained(vitprune.load(folder / "pruned"), str(folder / "adapter")).eval()
    with torch.no_grad():
        expected, loaded = adapted(pixel_values=x).logits, again(pixel_values=x).logits
        merged: Any = again.merge_and_unload()  # pyright: ignore[reportCallIssue]
        of_merged = merged(x).logits
    of_loaded, of_both = ((answers - expected).abs().max() for answers in (loaded, of_merged))
    print(f"LoRA: loaded differs by {of_loaded:.1e}, merged {of_both:.1e}")


if __name__ == "__main__":
    main()
