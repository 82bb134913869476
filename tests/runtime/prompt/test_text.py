"""Text that streams, stop strings, chat templates and placeholders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from example_counts import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from lvlm.core.errors import BundleError, ParameterError, PromptError
from lvlm.runtime.prompt.text import TextStream, Tokenizer, expand_placeholders

CORPUS = ["hello world, the end. stop!", "日本語 and 😀😁 emoji", "a b  c   d", "größe naïve €"] * 3


def byte_level() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "</s>", "<image>"],
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def byte_fallback() -> Library:
    words = [
        "▁",
        "▁▁▁",
        "a",
        "b",
        "c",
        "s",
        "t",
        "o",
        "p",
        "▁st",
        "op",
        "▁hello",
        "lo",
        "é",
        "日",
        "�",
    ]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 3}
    vocab |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    vocab |= {word: 260 + i for i, word in enumerate(words)}
    library = Library(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", "<image>"]
    library.add_special_tokens([AddedToken(name, special=True) for name in special])
    return library


def metaspace() -> Library:
    library = byte_fallback()
    library.decoder = decoders.Metaspace()
    return library


LIBRARIES = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "metaspace": metaspace()}
KINDS = sorted(LIBRARIES)


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, library in LIBRARIES.items():
        library.save(str(folder / f"{kind}.json"))
    return {kind: Tokenizer(folder / f"{kind}.json", eos_ids=[2]) for kind in KINDS}


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` before the stop string that is complete first; of two at once the longer."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens (some unknown), often bytes of real characters, or broken ones."""
    library = LIBRARIES[kind]
    number = library.token_to_id
    size = library.get_vocab_size()
    anything = st.lists(st.integers(0, size + 2), max_size=6)
    if kind == "byte_level":
        written = st.text("aé€😀 stop日\n", max_size=5).map(lambda text: library.encode(text).ids)
        table = dict(zip(range(256), byte_alphabet(), strict=True))
        of_byte = {byte: number(char) for byte, char in table.items()}
    else:
        of_byte = {byte: 4 + byte for byte in range(256)}
        words = st.sampled_from(range(260, size))
        written = st.lists(words, max_size=4)
    real = st.text("aé€😀日\n ", max_size=3).map(lambda t: [of_byte[b] for b in t.encode()])
    broken = st.lists(
        st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0x61]), max_size=8
    )
    parts = anything | written | real | broken.map(lambda bs: [of_byte[b] for b in bs])
    return st.lists(parts, max_size=12).map(lambda lists: [i for part in lists for i in part])


def byte_alphabet() -> list[str]:
    """The characters that byte-level BPE writes for the bytes 0 to 255 (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    table = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [table[b] for b in range(256)]


LEADS = ["", " ", "\n\n", "a", "st", " s"]
STOPS = ["stop", "\n", " ", "a", "top", "st", "€", "o w", "\ufffd", "日本", "aa", "a b", "p!"]
CASES = st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), ids_of(kind)))


@settings(max_examples=examples(300), deadline=None)
@given(CASES, st.lists(st.sampled_from(STOPS), max_size=3), st.sampled_from(LEADS))
@example(("byte_fallback", [4 + 0x61, 4 + 0xE2, 262]), [], "")
@example(("byte_fallback", [*(4 + byte for byte in b"xa b"), 262]), ["a b", " "], "")
@example(("byte_level", [256 + 3, 256 + 3]), [], "a")
def test_pieces_are_the_text_up_to_the_first_stop_string(
    tokenizers_by_kind: dict[str, Tokenizer],
    case: tuple[str, list[int]],
    stop: list[str],
    lead: str,
) -> None:
    kind, ids = case
    tokenizer = tokenizers_by_kind[kind]
    stream = TextStream(tokenizer, stop, lead)
    text = "".join([stream.push(i) for i in ids]) + stream.finish()
    whole = tokenizer.decode(ids).removeprefix(lead)
    assert text == cut_at_stop(whole, stop)
    assert bool(stream.stopped) == any(s in whole for s in stop)


@settings(max_examples=examples(100), deadline=None)
@given(CASES)
def test_all_that_is_certain_is_given_at_once(
    tokenizers_by_kind: dict[str, Tokenizer], case: tuple[str, list[int]]
) -> None:
    kind, ids = case
    tokenizer = tokenizers_by_kind[kind]
    stream = TextStream(tokenizer)
    so_far = ""
    for n, token in enumerate(ids, 1):
        so_far += stream.push(token)
        if kind == "byte_level" or (token >= 260 and tokenizer.visible_token(token) is not None):
            assert so_far == tokenizer.decode(ids[:n]).removesuffix("\ufffd")


@pytest.mark.parametrize("before", range(10, 20))
def test_a_character_in_pieces_where_old_tokens_are_forgotten(
    tokenizers_by_kind: dict[str, Tokenizer], before: int
) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    table = byte_alphabet()
    stream = TextStream(tokenizer)
    ids = [tokenizer.token_id(table[byte]) for byte in b"a" * before + "😀".encode()]
    assert [stream.push(i) for i in ids] == ["a"] * before + ["", "", "", "😀"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", ["a", "�", "▁", "junk"])
def test_the_work_per_token_does_not_grow(
    tokenizers_by_kind: dict[str, Tokenizer],
    kind: str,
    token: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    library = LIBRARIES[kind]
    number = library.token_to_id(token)
    if number is None:  # a byte that no character has, or another word
        number = library.token_to_id(byte_alphabet()[0xFF]) or library.token_to_id("▁hello")
    decode, lengths = tokenizer.decode, []

    def counted(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    stream = TextStream(tokenizer)
    text = "".join([stream.push(number) for _ in range(500)]) + stream.finish()
    assert text == decode([number] * 500)
    assert max(lengths) <= 20
    assert len(lengths) < 1000


def test_a_long_run_of_byte_tokens_is_decoded_a_few_times(
    tokenizers_by_kind: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers_by_kind["byte_fallback"]
    ids = [4 + byte for byte in "€".encode() * 300] + [262] * 100
    decode, work = tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda ids: work.append(len(ids)) or decode(ids))
    stream = TextStream(tokenizer)
    assert "".join([stream.push(i) for i in ids]) + stream.finish() == "€" * 300 + "a" * 100
    assert sum(work) < 20 * len(ids)


def test_stop_string_in_pieces(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_fallback"]
    ids = [tokenizer.token_id(t) for t in ["a", "▁st", "op", "b"]]
    stream = TextStream(tokenizer, ["stop"])
    assert [stream.push(i) for i in ids] == ["a", " ", "", ""]
    assert stream.stopped == "stop"
    assert stream.finish() == ""
    stream = TextStream(tokenizer, ["stoop"])
    assert [stream.push(i) for i in ids] == ["a", " ", "stop", "b"]
    assert not stream.stopped


def test_stop_string_that_is_a_special_token(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    """It is no text, so it is matched by its id; text that was held back comes before it."""
    tokenizer = tokenizers_by_kind["byte_fallback"]
    special = "</s>"
    ids = [tokenizer.token_id(t) for t in ["a", "▁st", special, "op", "b"]]
    stream = TextStream(tokenizer, ["stop", special])
    assert "".join([stream.push(i) for i in ids]) + stream.finish() == "a st"
    assert stream.stopped == special
    stream = TextStream(tokenizer, ["stop"])
    assert "".join([stream.push(i) for i in ids]) == "a "
    assert stream.stopped == "stop"
    with pytest.raises(ParameterError, match=f"special token '{special}' and more; give"):
        TextStream(tokenizer, [special + " then"])


def test_held_text_comes_at_the_end(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_fallback"]
    stream = TextStream(tokenizer, "stop")
    assert stream.push(tokenizer.token_id("▁st")) == ""
    assert stream.finish() == "st"
    with pytest.raises(ParameterError, match="empty"):
        TextStream(tokenizer, ["a", ""])


def test_encode_and_decode(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    image = tokenizer.token_id("<image>")
    ids = tokenizer.encode("hello <image>€</s>")
    assert image in ids
    assert tokenizer.decode(ids) == "hello €"
    assert tokenizer.eos_ids == {2}
    with pytest.raises(BundleError, match="no token '<video>'"):
        tokenizer.token_id("<video>")
    with pytest.raises(PromptError, match="Unicode"):
        tokenizer.encode("\ud800")


def test_prompts_are_never_cut_or_padded(tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", [])
    assert tokenizer.decode(tokenizer.encode("hello world, 日本語")) == "hello world, 日本語"
    assert len(tokenizer.encode("a")) == 1


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}', b"\0", b"\xff{", DEEP.encode()],
)
def test_broken_tokenizer(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(path, [])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        ({"SpecialToken": {"id": "<gone>", "type_id": 0}}, "names '<gone>', which it lacks"),
        ({"Sequence": {"id": "B", "type_id": 0}}, "wants two texts"),
    ],
)
def test_post_processors_that_would_panic(
    piece: dict[str, object], reason: str, nested: bool
) -> None:
    data = json.loads(LIBRARIES["byte_level"].to_str())
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [piece, sequence],
        "pair": [sequence, sequence],
        "special_tokens": {},
    }
    data["post_processor"] = (
        {"type": "Sequence", "processors": [processor]} if nested else processor
    )
    with pytest.raises(BundleError, match=reason):
        Tokenizer.of_text(json.dumps(data), [])


def test_placeholders() -> None:
    assert expand_placeholders([5, 9, 6, 9], 9, [[9, 9], [7, 9, 8]], "") == [5, 9, 9, 6, 7, 9, 8]
    assert expand_placeholders([5, 6], 9, [], "") == [5, 6]
    with pytest.raises(PromptError, match="has 2 image placeholders for 1 image; do"):
        expand_placeholders([9, 9], 9, [[9]], "do")
    with pytest.raises(PromptError, match="has 0 image placeholders for 2 images; do"):
        expand_placeholders([1], 9, [[9], [9]], "do")
