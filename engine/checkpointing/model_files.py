"""The Hugging Face files that travel with a run: config, tokenizer, chat template, generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.documents import Documents
from data.preparation.tokenizer import tokenizer_fingerprint
from models.conversion.hf_reader import copy_side_files
from models.hf_config import apply_overrides, read_config

# Where transformers keeps a tokenizer's chat template, and those that are chosen by name.
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


def write_model_files(files: Path, target: Path, *, overrides: dict[str, Any], data: dict[str, Any]) -> None:
    """Copies what lies in `files` beside the weights to `target`, with what the run changes; all else byte for byte.

    overrides: fields of config.json. data: `tokenizer`, the directory of the tokenizer it was prepared with,
    `chat_template`, a template or several by name, and `end_token_ids`; each may be missing or None. Templates that
    differ from the model's own replace them, and the tokens that end a turn join `eos_token_id`: without them a base
    model's finetune would not stop.
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
    if template := data.get("chat_template"):
        wanted, own = _by_name(template), _own_templates(target)
        if wanted != own and not (isinstance(template, str) and template == own.get("default")):
            _replace_templates(target, wanted)
    _add_end_tokens(target, data.get("end_token_ids") or [])


def check_tokenizers(model: Path, indexes: Iterable[Documents], *, resized: bool = False) -> None:
    """Refuses data whose tokens mean other text to this model; a model without a tokenizer takes the data's.

    resized: the data's tokenizer may have tokens that the model's has not, as long as the others stay what they are.
    """
    wanted = {index.path: index.meta.get("tokenizer_fingerprint") for index in indexes}
    if not any(wanted.values()) or not any(model.glob("tokenizer*")):
        return
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    fingerprint = tokenizer_fingerprint(own)
    for data, expected in wanted.items():
        if expected in (None, fingerprint):
            continue
        if resized:
            larger = AutoTokenizer.from_pretrained(data / "tokenizer", trust_remote_code=False)
            if own.get_vocab().items() <= larger.get_vocab().items():
                continue
        raise ValueError(
            f"--data {data} was prepared with another tokenizer than that of --model {model}; prepare the data "
            f"again with prepare_data.py --model {model}"
        )


def _by_name(templates: str | list[dict[str, str]] | dict[str, str]) -> dict[str, str]:
    """Chat templates by name, from each form in which transformers keeps them."""
    if isinstance(templates, str):
        return {"default": templates}
    return dict(templates) if isinstance(templates, dict) else {one["name"]: one["template"] for one in templates}


def _own_templates(folder: Path) -> dict[str, str]:
    """The chat templates that transformers would read from a directory."""
    files = {path.stem: path for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))}
    if (file := folder / _TEMPLATE).exists():
        files["default"] = file
    config = folder / "tokenizer_config.json"
    if files or not config.exists():
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return _by_name(json.loads(config.read_text(encoding="utf-8")).get("chat_template") or {})


def _replace_templates(folder: Path, templates: dict[str, str]) -> None:
    shutil.rmtree(folder / _MORE_TEMPLATES, ignore_errors=True)
    (folder / _TEMPLATE).unlink(missing_ok=True)
    for name, template in templates.items():
        file = folder / (_TEMPLATE if name == "default" else f"{_MORE_TEMPLATES}/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")
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
