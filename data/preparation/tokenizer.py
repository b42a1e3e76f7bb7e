"""Tokenizers: from a directory or hub name, with the chat template that is to be used."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from data.preparation.named_files import find_named, names_in, read_utf8

# the project's own templates, by name
CHAT_TEMPLATES = Path(__file__).parents[2] / "examples" / "chat_templates"
# any of these makes a directory one with a tokenizer
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
)
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")


def templates_of(tokenizer) -> str | dict[str, str]:
    """The tokenizer's own chat template, or its templates by their names. Raises ValueError where it has none."""
    templates = tokenizer.chat_template
    if isinstance(templates, list):  # the older way of keeping several
        templates = {one["name"]: one["template"] for one in templates}
    if not templates or (isinstance(templates, dict) and "default" not in templates):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template: give one with"
            " --chat-template, a file or a name, or the tokenizer of a chat model with --tokenizer; rows of plain text"
            " need none with --format text"
        )
    return templates


def load_tokenizer(name: str, chat_template: str | Path | None = None, *, needs_template: bool = True):
    """The tokenizer of a directory or hub name, with the chat templates that are to be used.

    chat_template: a file, or the name of one of the project's own. Raises ValueError.
    """
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ValueError(f"no tokenizer could be loaded from {name}: there is no such directory")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _FILES):
        raise ValueError(
            f"no tokenizer could be loaded from {name}: the directory has none of {', '.join(_FILES)};"
            " name the directory that has them with --tokenizer"
        )
    try:
        tokenizer = _class_of(name).from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no tokenizer could be loaded from {name}: {reason}") from error
    backend_of(tokenizer)
    model = Path(name) / "tokenizer.model"
    if model.is_file() and not (Path(name) / "tokenizer.json").is_file():
        _cut_as_sentencepiece(tokenizer, model)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    elif needs_template or tokenizer.chat_template:
        tokenizer.chat_template = templates_of(tokenizer)
    return tokenizer


def _class_of(name: str) -> Any:
    """The class that loads a tokenizer: transformers' own choice, which costs the import of torch, or its generic one.

    A directory whose files name the generic class needs no choice.
    """
    config = Path(name) / "tokenizer_config.json"
    if config.is_file() and (Path(name) / "tokenizer.json").is_file():
        named = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(named, dict) and named.get("tokenizer_class") in _GENERIC and "auto_map" not in named:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def read_template(given: str | Path) -> str:
    """The text of a chat template given by its path or by its name. Raises ValueError."""
    file = template_file(given)
    return read_utf8(file, f"--chat-template {file}")


def template_file(given: str | Path) -> Path:
    """The file of a chat template given by its path or by the name of one of the project's own."""
    if (file := find_named(given, CHAT_TEMPLATES, (".jinja",))) is not None:
        return file
    names = ", ".join(names_in(CHAT_TEMPLATES, (".jinja",))) or "none"
    raise ValueError(
        f"--chat-template {str(given)[:80]}: there is no such file, and no template of that name (there are {names})"
    )


def _cut_as_sentencepiece(tokenizer, file: Path) -> None:
    """Gives a tokenizer that was converted from a SentencePiece model that model's own way with spaces.

    transformers 5.23 forgets the space that the model puts before a text, and that it takes spaces together. Raises
    ValueError where texts are still cut otherwise than by SentencePiece itself.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    content = file.read_bytes()
    try:
        ours = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        return  # a file of another kind by the same name
    if _agree(tokenizer, ours):
        return
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(content)
    rules = proto.normalizer_spec
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend_of(tokenizer).normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if not _agree(tokenizer, ours):
        raise ValueError(
            f"{file} cannot be converted exactly: give a tokenizer with a tokenizer.json, which transformers'"
            " AutoTokenizer and save_pretrained make of it where it knows the model's class"
        )


def _agree(tokenizer, sentencepiece_model) -> bool:
    texts = ("Two apples, 3.50 each: 1+1=2", "two  spaces", " before", "after ", "a\nb\n\n", "é ﬁ 😀", "\tx", "  ")
    return all(
        tokenizer(text, add_special_tokens=False)["input_ids"] == sentencepiece_model.encode(text) for text in texts
    )


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of vocabulary, merges and added tokens: equal where the same pieces have the same ids.

    Pre-tokenisation, chat template and special token names are no part of it, and saving and loading do not change it.
    """
    backend = json.loads(backend_of(tokenizer).to_str())
    model = backend["model"]
    added = sorted((token["id"], token["content"]) for token in backend["added_tokens"])
    content = [model.get("vocab"), model.get("merges"), added]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_state(tokenizer) -> str:
    """A hash of everything that decides what a tokenizer makes of a text, and of its special tokens' names."""
    content = [
        backend_of(tokenizer).to_str(),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def backend_of(tokenizer) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(f"the tokenizer of {name} has no fast version (tokenizer.json), which offsets need")
    return backend


def text_ends(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens before and after a text that is a document of its own: int32 [0 or 1] each.

    A text begins with the beginning-of-sequence token where the tokenizer puts one itself, and ends with the
    end-of-sequence token where there is one.
    """
    first = tokenizer("a")["input_ids"][:1] if tokenizer.bos_token_id is not None else []
    begin = [token for token in first if token == tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.array(begin, np.int32), np.array(end, np.int32)
