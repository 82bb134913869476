"""Token ids of text with literals in it: as they are where no special token is written there, and
never a special token's where one is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from lvlm.core.errors import BundleError
from lvlm.runtime.prompt import literal_tokens
from lvlm.runtime.prompt.literal_text import Literals
from lvlm.runtime.prompt.literal_tokens import LiteralEncoder
from lvlm.runtime.prompt.text import Tokenizer

CORPUS = [
    "hello world, the image of an end. stop! user: im start < s > | end of the text",
    "日本語 and 😀😁 emoji, größe naïve €", "a b  c   d <x> [y] /s image <imag | > end",
] * 3  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<|im_end|>", "[SEP]"]
UNKNOWN = SPECIAL[0]


def trained(model: object, trainer: object) -> Library:
    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.train_from_iterator(CORPUS, trainer)
    return library


def byte_level() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    library.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return library


def merged() -> Library:
    """Special tokens are words of the model's, with merges that make them of text."""
    library = Library(models.BPE())
    library.train_from_iterator(
        CORPUS + ["</s><image>"] * 50, trainers.BpeTrainer(vocab_size=400, show_progress=False)
    )
    assert library.token_to_id("</s><image>") is not None
    library.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return library


def whole_words() -> Library:
    """As Llama 3's: a word that the vocabulary has is not put together."""
    library = byte_level()
    library.model.ignore_merges = True
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return library


def sentencepiece() -> Library:
    """As Llama's first: a space before every part of the text, bytes for what is unknown."""
    words = [
        "▁",
        "▁▁",
        "h",
        "e",
        "l",
        "o",
        "<",
        ">",
        "/",
        "s",
        "i",
        "m",
        "a",
        "g",
        "▁h",
        "▁<",
        "im",
    ]
    vocab = {word: n for n, word in enumerate([*SPECIAL[:3], *words])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [("▁", "h"), ("▁", "<"), ("i", "m"), ("▁", "▁")]
    model = models.BPE(vocab, merges, byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True)
    library = Library(model)
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    library.normalizer = normalizers.Sequence(parts)
    library.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    )
    pair = [("<s>", 1)]
    library.post_processor = processors.TemplateProcessing("<s> $A", None, pair)
    return library


def metaspace() -> Library:
    library = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False
        ),
    )
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return library


def wordpiece() -> Library:
    library = Library(models.WordPiece(unk_token=UNKNOWN))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
    )
    pair = [("[SEP]", 5), ("<s>", 1)]
    library.post_processor = processors.TemplateProcessing("<s> $A [SEP]", None, pair)
    return library


def words() -> Library:
    vocab = [*SPECIAL, "hello", "<", "image", "s", "<imag"]
    library = Library(models.WordLevel({w: n for n, w in enumerate(vocab)}, unk_token=UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return library


def greedy_spaces() -> Library:
    """Special tokens that take the white space beside them, stand alone, or are normalized."""
    library = byte_level()
    library.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    library.add_special_tokens(
        [
            AddedToken("<|left|>", special=True, lstrip=True),
            AddedToken("<|right|>", special=True, rstrip=True),
            AddedToken("<alone>", special=True, single_word=True),
            AddedToken("<Normal>", special=True, normalized=True),
        ]
    )
    library.add_tokens([AddedToken("  "), AddedToken("<think>")])
    return library


KINDS = {
    kind.__name__: kind
    for kind in (
        *(byte_level, merged, whole_words, sentencepiece, metaspace, wordpiece, words),
        greedy_spaces,
    )
}


@cache
def library(kind: str) -> Library:
    return KINDS[kind]()


@cache
def encoder(kind: str) -> LiteralEncoder:
    return Tokenizer.of_text(library(kind).to_str(), [2]).literal_encoder(["<image>"])


def special_ids(kind: str) -> set[int]:
    added = library(kind).get_added_tokens_decoder().items()
    return {number for number, token in added if token.special and token.content != UNKNOWN}


def split(runs: Sequence[tuple[str, bool]]) -> tuple[str, Literals]:
    """A text whose literal runs are hidden."""
    literals = Literals([text for text, _ in runs])
    return "".join(literals.hide(t) if literal else t for t, literal in runs), literals


def encode(kind: str, runs: Sequence[tuple[str, bool]], special: bool = True) -> list[int]:
    return encoder(kind)(*split(runs), special)


OWN = [
    "<s>",
    "</s>",
    "<image>",
    "USER: ",
    " ",
    "\n",
    "end <image>\n",
    "<|im_end|> ",
    "<|right|>",
    "[SEP]",
]
HARMLESS = st.text("helo worldimag ▁日😀é\n", max_size=12)
DANGEROUS = st.sampled_from(
    [*SPECIAL, "<", ">", "image>", "<imag", "<|im_", "end|>", " <image> ", "</s", "<|left|>",
     "<alone>", "<|right|>", "<normal>", "<Normal>", "[sep]", "< s >", "<think>", "  "]
)  # fmt: skip


def mixed(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[str, bool]]]:
    own = st.sampled_from(OWN).map(lambda text: (text, False))
    return st.lists(own | texts.map(lambda text: (text, True)), max_size=7)


@pytest.mark.parametrize("kind", KINDS)
@given(runs=mixed(HARMLESS), special=st.booleans())
def test_without_special_tokens_in_messages_nothing_changes(
    kind: str, runs: list[tuple[str, bool]], special: bool
) -> None:
    whole = "".join(text for text, _ in runs)
    assert (
        encode(kind, runs, special) == library(kind).encode(whole, add_special_tokens=special).ids
    )


@pytest.mark.parametrize("kind", KINDS)
@given(runs=mixed(HARMLESS | st.lists(DANGEROUS | HARMLESS, max_size=4).map("".join)))
def test_special_tokens_in_messages_are_text(kind: str, runs: list[tuple[str, bool]]) -> None:
    """As many of each as the template has written."""
    special = special_ids(kind)
    got = [number for number in encode(kind, runs) if number in special]
    blanked = [("\n" if literal else text, literal) for text, literal in runs]
    template = library(kind).encode("".join(text for text, _ in blanked)).ids
    assert got == [number for number in template if number in special]


@given(runs=mixed(HARMLESS | st.lists(DANGEROUS | HARMLESS, max_size=4).map("".join)))
def test_what_is_written_there_is_the_text(runs: list[tuple[str, bool]]) -> None:
    """Against a tokenizer that never knew special tokens: the parts between the template's own."""
    bare = Library.from_str(library("byte_level").to_str())
    bare.encode_special_tokens = True
    expected: list[int] = []
    part = ""
    for text, literal in [*runs, ("<s>", False)]:
        if literal:
            part += text
            continue
        rest = text
        while rest:
            found = min(
                (t for t in SPECIAL if t in rest),
                key=lambda t: (rest.index(t), -len(t)),
                default=None,
            )
            before, rest = (rest, "") if found is None else rest.split(found, 1)
            part += before
            if found is not None:
                expected += bare.encode(part).ids if part else []
                expected.append(bare.token_to_id(found))
                part = ""
    runs = [*runs, ("<s>", False)]
    assert encode("byte_level", runs) == expected


def test_private_names_are_known_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who guesses the twin's names gets another twin."""
    drawn = iter(range(10**6))
    monkeypatch.setattr(literal_tokens.secrets, "choice", lambda some: some[next(drawn) // 8])
    own = Tokenizer.of_text(library("byte_level").to_str(), [2]).literal_encoder([])
    kept = own(*split([("</s>", True)]), True)
    guess = f"{chr(0xE000) * 8}2{chr(0xE000) * 8}"
    assert 2 not in kept
    ids = own(*split([("</s>" + guess, True)]), True)
    assert not set(ids) & special_ids("byte_level")
    assert own._twin is not None
    assert own._twin.key == chr(0xE001) * 8


def test_a_tokenizer_that_can_have_no_twin() -> None:
    """A normalizer that leaves no name as it is, with special tokens that go through it."""
    odd = byte_level()
    odd.normalizer = normalizers.BertNormalizer(clean_text=True)
    odd.add_special_tokens([AddedToken("<n>", special=True, normalized=True)])
    own = Tokenizer.of_text(odd.to_str(), [2]).literal_encoder([])
    assert own(*split([("a </s>", True), ("<n>", False)]), True).count(odd.token_to_id("<n>")) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(literal_tokens, "_ALPHABETS", (range(0xE000, 0xE100),))
        other = Tokenizer.of_text(odd.to_str(), [2]).literal_encoder([])
        with pytest.raises(BundleError, match="leave them out of the messages"):
            other(*split([("a </s>", True)]), True)
