"""The Hugging Face files that travel with a run: config, tokenizer, chat template, generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.documents import Documents
from data.preparation.encoder import template_of, tokenizer_fingerprint
from models.conversion.hf_reader import copy_side_files
from models.hf_config import apply_overrides, read_config


def write_model_files(files: Path, target: Path, *, overrides: dict[str, Any], data: dict[str, Any]) -> None:
    """Copies what lies in `files` beside the weights to `target`, with what the run changes; all else byte for byte.

    overrides: fields of config.json. data: the data's meta.json, with `chat_template` and `end_token_ids`,
    and `tokenizer`, the directory of the tokenizer it was prepared with. A template that differs from the
    model's own replaces it, and the token that ends a turn joins `eos_token_id`: without it a base model's
    finetune would not stop.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    copied = copy_side_files(files, target, with_index=True)
    if any(value is not None for value in overrides.values()):
        config = apply_overrides(read_config(files), overrides)
        _write_json(target / "config.json", config)
    resized = overrides.get("vocab_size") is not None
    if data.get("tokenizer") and (resized or not any(name.startswith("tokenizer") for name in copied)):
        copy_side_files(Path(data["tokenizer"]), target)
    if (template := data.get("chat_template")) and template != _own_template(target):
        _replace_template(target, template)
    _add_end_tokens(target, data.get("end_token_ids") or [])


def check_tokenizers(model: Path, indexes: Iterable[Documents], *, resized: bool = False) -> None:
    """Refuses data whose tokens mean other text to this model; a model without a tokenizer takes the data's.

    resized: the data's tokenizer may have tokens that the model's has not, as long as the others stay what they are.
    """
    wanted = {index.path: index.meta.get("tokenizer_fingerprint") for index in indexes}
    if not any(wanted.values()) or not any(model.glob("tokenizer*")):
        return
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(model)
    fingerprint = tokenizer_fingerprint(own)
    for data, expected in wanted.items():
        if expected in (None, fingerprint):
            continue
        if resized and own.get_vocab().items() <= AutoTokenizer.from_pretrained(data / "tokenizer").get_vocab().items():
            continue
        raise ValueError(
            f"--data {data} was prepared with another tokenizer than that of --model {model}; prepare the data "
            f"again with prepare_data.py --model {model}"
        )


def _own_template(folder: Path) -> str | None:
    """The chat template that transformers would use from a directory, or None."""
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").exists():
        return None
    from types import SimpleNamespace

    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    try:
        return template_of(SimpleNamespace(chat_template=config.get("chat_template"), name_or_path=str(folder)))
    except ValueError:
        return None


def _replace_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.exists():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            _write_json(file, config)


def _add_end_tokens(folder: Path, end_token_ids: list[int]) -> None:
    """Adds turn-ending tokens to generation_config's eos_token_id, keeping those that are there."""
    file = folder / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    own = config.get("eos_token_id")
    if own is None:
        own = read_config(folder).get("eos_token_id")
    present = own if isinstance(own, list) else [] if own is None else [own]
    missing = [token for token in end_token_ids if token not in present]
    if missing:
        together = missing + present
        _write_json(file, config | {"eos_token_id": together if len(together) > 1 else together[0]})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
