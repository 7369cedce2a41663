"""Reads what `crosstrace export` wrote for a trainer by that trainer's own loader; test_recipes.py starts it.

    python reads_recipes.py llamafactory|axolotl SETTINGS.yaml ROWS.json

Each row is written as {input_ids, labels}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def by_llamafactory(settings: dict[str, Any]) -> Any:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from transformers import AutoTokenizer

    model, data, training, finetuning, _ = get_train_args(settings)
    assert finetuning.disable_shuffling
    # (the package's own loader of tokenizers stands in a module that imports an old TRL)
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    template = get_template_and_fix_tokenizer(tokenizer, data)
    return get_dataset(template, model, data, training, stage="sft", tokenizer=tokenizer)["train_dataset"]


def by_axolotl(settings: dict[str, Any]) -> Any:
    from axolotl.loaders.tokenizer import load_tokenizer
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.data.sft import prepare_datasets
    from axolotl.utils.dict import DictDefault

    cfg = validate_config(DictDefault(settings | {"dataset_num_proc": 1}))
    normalize_config(cfg)
    assert cfg.curriculum_sampling and not cfg.shuffle_merged_datasets
    return prepare_datasets(cfg, load_tokenizer(cfg))[0]


def main() -> None:
    trainer, settings, output = sys.argv[1:]
    read = {"llamafactory": by_llamafactory, "axolotl": by_axolotl}[trainer]
    rows = read(yaml.safe_load(Path(settings).read_text()))
    values = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    Path(output).write_text(json.dumps(values))


if __name__ == "__main__":  # axolotl starts processes
    main()
