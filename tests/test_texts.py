"""Contrast pairs, lists of texts, token ids, position rules, and the example data."""

from __future__ import annotations

import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tokenizer

from expertsteer_nnsight.texts import (
    ContrastPairs,
    as_texts,
    check_disjoint,
    encode,
    example,
    texts_hash,
    token_index,
)

ROWS = [
    {"positive": "good soup", "negative": "bad soup", "split": "train"},
    {"positive": "kind dog", "negative": "mean dog", "split": "train"},
    {"positive": "warm bed", "negative": "cold bed", "split": "test"},
]
TUPLES = [(r["positive"], r["negative"]) for r in ROWS]
CHAT = [{"role": "user", "content": "hello world"}]
LONG_CHAT = [*CHAT, {"role": "assistant", "content": "a dog"}, {"role": "user", "content": "quick fox"}]


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n", encoding="utf-8")
    return path


# contrast pairs


def test_pairs_from_tuples_rows_file_and_dataset_are_the_same(tmp_path):
    file = write_lines(tmp_path / "pairs.jsonl", ROWS)
    found = [
        ContrastPairs.of(ROWS),
        ContrastPairs.of(file),
        ContrastPairs.of(str(file)),
        ContrastPairs.from_jsonl(file),
        ContrastPairs.of(datasets.Dataset.from_list(ROWS)),
    ]
    for pairs in found:
        assert pairs == found[0]
        assert list(pairs) == TUPLES
        assert pairs.splits == ("train", "train", "test")
    plain = ContrastPairs.of(TUPLES)
    assert list(plain) == TUPLES and plain.splits == ()
    assert list(ContrastPairs.of(iter(TUPLES))) == TUPLES
    assert list(ContrastPairs.of([{"positive": p, "negative": n} for p, n in TUPLES])) == TUPLES
    assert ContrastPairs.of(plain) is plain


def test_pairs_of_chats(tmp_path):
    rows = [{"positive": CHAT, "negative": LONG_CHAT}]
    for pairs in (ContrastPairs.of(rows), ContrastPairs.of(write_lines(tmp_path / "chats.jsonl", rows))):
        assert pairs.texts == [CHAT, LONG_CHAT]
    assert ContrastPairs.of([(CHAT, LONG_CHAT)]).texts == [CHAT, LONG_CHAT]


def test_texts_labels_and_groups_go_pair_by_pair():
    pairs = ContrastPairs.of(ROWS)
    assert pairs.texts == ["good soup", "bad soup", "kind dog", "mean dog", "warm bed", "cold bed"]
    assert pairs.labels == [1, 0, 1, 0, 1, 0]
    assert pairs.groups == [0, 0, 1, 1, 2, 2]


def test_splits_slices_and_indices():
    pairs = ContrastPairs.of(ROWS)
    assert len(pairs) == 3
    assert list(pairs.split("train")) == TUPLES[:2]
    assert pairs.split("train").splits == ("train", "train")
    assert list(pairs.split("test")) == TUPLES[2:]
    assert pairs[1] == TUPLES[1] and pairs[-1] == TUPLES[-1]
    assert list(pairs[1:]) == TUPLES[1:] and pairs[1:].splits == ("train", "test")
    assert list(pairs[[2, 0]]) == [TUPLES[2], TUPLES[0]] and pairs[[2, 0]].splits == ("test", "train")
    assert repr(pairs) == "ContrastPairs(3 pairs, {'train': 2, 'test': 1})"
    with pytest.raises(ValueError, match=r"No pair has the split 'dev'; there are \['test', 'train'\]"):
        pairs.split("dev")
    with pytest.raises(ValueError, match="No pair has the split 'train'; there are no splits"):
        ContrastPairs.of(TUPLES).split("train")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "must be .positive, negative. tuples"),
        (["ab", "cd"], "must be .positive, negative. tuples"),
        ([("a", "b", "c")], "must be .positive, negative. tuples"),
        (
            [{"positive": "a", "text": "b"}],
            r"need the keys positive and negative, but row 0 has \['positive', 'text'\]",
        ),
        ([*ROWS, {"positive": "a"}], r"need the keys positive and negative, but row 3 has \['positive'\]"),
        ([*ROWS, {"positive": "a", "negative": "b"}], "as many splits, if any.*: found 4, 4 and 3"),
        ([("a", " ")], "Text 0 is neither a non-empty string nor a list of chat messages"),
        ([("a", "b"), ("c", None)], "Text 1 is neither .*: None"),
    ],
)
def test_pairs_that_are_none(pairs, message):
    with pytest.raises(ValueError, match=message):
        ContrastPairs.of(pairs)


def test_pairs_of_unequal_numbers():
    with pytest.raises(ValueError, match=r"as many negatives as positives .*: found 2, 1 and 0"):
        ContrastPairs(("a", "b"), ("c",))
    with pytest.raises(ValueError, match=r"as many splits, if any.*: found 1, 1 and 2"):
        ContrastPairs(("a",), ("c",), ("train", "test"))


# lists of texts


def test_texts_from_lists_files_and_datasets(tmp_path):
    wanted = ["one", "two, ü"]
    plain, lines = tmp_path / "texts.txt", write_lines(tmp_path / "texts.jsonl", [{"text": t, "x": 1} for t in wanted])
    plain.write_text("one\n\ntwo, ü\n", encoding="utf-8")
    dataset = datasets.Dataset.from_dict({"text": wanted, "other": ["a", "b"]})
    for texts in (wanted, tuple(wanted), iter(wanted), plain, str(plain), lines, str(lines), dataset):
        assert as_texts(texts) == wanted
    assert as_texts(dataset, column="other") == ["a", "b"]
    assert as_texts(write_lines(tmp_path / "b.jsonl", [{"body": "x"}]), column="body") == ["x"]
    assert as_texts([CHAT, "a", tuple(LONG_CHAT)]) == [CHAT, "a", LONG_CHAT]
    assert as_texts(datasets.Dataset.from_dict({"text": [CHAT, LONG_CHAT]})) == [CHAT, LONG_CHAT]
    assert as_texts(datasets.Dataset.from_dict({"text": wanted}).to_iterable_dataset()) == wanted


def test_texts_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"One string was given where a list of texts is needed: write \[text\]"):
        as_texts("hello")
    with pytest.raises(ValueError, match="One string was given"):
        as_texts("two lines\nand a name.txt")
    with pytest.raises(ValueError, match=r"no column 'text', only \['other'\]: pass dataset\['other'\]"):
        as_texts(datasets.Dataset.from_dict({"other": ["a"]}))
    with pytest.raises(ValueError, match="There are no texts"):
        as_texts([])
    for wrong in ("", "  \n", None, 3, [], ["a"], [{"role": "user"}], {"role": "user", "content": "a"}):
        with pytest.raises(ValueError, match="Text 1 is neither a non-empty string nor a list of chat messages"):
            as_texts(["fine", wrong])
    with pytest.raises(ValueError, match="Text 0 is neither"):
        as_texts(CHAT)  # one chat instead of a list of chats
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="There are no texts"):
        as_texts(tmp_path / "empty.txt")


def test_anchors_must_not_be_labelled_texts():
    pairs = ContrastPairs.of(ROWS)
    check_disjoint(["something else", CHAT], pairs.texts)
    for variant in ("good soup", "Good SOUP", " good   soup\n", "good\tsoup"):
        with pytest.raises(
            ValueError, match=r"1 of the anchors are labelled texts too \(such as 'good soup'\): take them out"
        ):
            check_disjoint(["something else", variant], pairs.texts)
    with pytest.raises(ValueError, match="1 of the anchors"):
        check_disjoint([[{"role": "user", "content": "HELLO  world"}]], [CHAT])
    with pytest.raises(ValueError, match="2 of the anchors"):
        check_disjoint(["Good soup", "cold bed"], pairs.texts)


def test_hash_of_texts_knows_order_and_borders():
    assert texts_hash(["a", "b"]) == texts_hash(iter(["a", "b"]))
    assert len({texts_hash(t) for t in (["a", "b"], ["b", "a"], ["ab"], ["a\nb"], ["a", "b", ""], [CHAT], ["a"])}) == 7


# token ids


def test_strings_get_what_the_tokenizer_prepends_and_no_more():
    plain = tokenizer()("hello world")["input_ids"]
    assert encode(tokenizer(), "hello world") == (plain, 0)
    assert encode(tokenizer(bos=True), "hello world") == ([1, *plain], 1)
    # without a tokenizer that prepends, a text's own "<s>" is a token like others
    assert encode(tokenizer(), "<s>hello world") == ([1, *plain], 0)


@pytest.mark.parametrize("chat", [CHAT, LONG_CHAT])
@pytest.mark.parametrize("bos", [False, True])
def test_chats_go_through_the_template_and_get_no_bos_besides(bos, chat):
    tok = tokenizer(bos)
    written = "".join(f"<s>{m['role']} {m['content']}</s>" for m in chat) + "<s>assistant "
    ids, prefix = encode(tok, chat)
    assert ids == tok(written, add_special_tokens=False)["input_ids"]
    assert ids.count(1) == len(chat) + 1  # one a message, none besides
    assert prefix == (1 if bos else 0)


def test_texts_without_tokens_or_template():
    tok = tokenizer(bos=True)
    with pytest.raises(ValueError, match="A text has no tokens of its own: ''"):
        encode(tok, "")
    tok.chat_template = None
    with pytest.raises(ValueError, match="tokenizer has no chat template: pass strings"):
        encode(tok, CHAT)


TOKENS = st.tuples(st.integers(0, 3), st.lists(st.integers(3, 9), min_size=1, max_size=12))


@given(TOKENS)
def test_last_and_mean(text):
    prefix, own = text
    ids = [1] * prefix + own
    assert token_index("last", ids, prefix) == len(ids) - 1 == token_index(-1, ids, prefix)
    assert token_index("mean", ids, prefix) is None


@given(TOKENS, st.integers(-15, 15))
def test_indices_count_own_tokens_from_either_end(text, index):
    prefix, own = text
    ids = [1] * prefix + own
    rules = (index, lambda seen: index)
    for rule in rules:
        if -len(own) <= index < len(own):
            found = token_index(rule, ids, prefix)
            assert prefix <= found < len(ids)  # never the prefix, never behind the end
            assert found - prefix in (index, index + len(own)) and ids[found] == own[index]
        else:
            with pytest.raises(
                ValueError, match=f"Position {index} was asked for, .* only {len(own)} tokens of its own"
            ):
                token_index(rule, ids, prefix)


@given(TOKENS)
def test_a_function_sees_own_tokens_only(text):
    prefix, own = text
    seen = []
    token_index(lambda ids: seen.append(ids) or 0, [1] * prefix + own, prefix)
    assert seen == [own]


def test_what_is_no_position():
    for wrong in (lambda ids: "last", lambda ids: None, lambda ids: 0.5):
        with pytest.raises(ValueError, match='position must be "last", "mean", an index or a function'):
            token_index(wrong, [3, 4], 0)
    with pytest.raises(ValueError, match="got 'first'"):
        token_index("first", [3, 4], 0)


# example data


def normal(texts):
    return [" ".join(t.lower().split()) for t in texts]


def test_example_data_is_large_enough_and_holds_nothing_twice():
    pairs, probe = example("sentiment_pairs"), example("sentiment_probe")
    general, domain = example("general"), example("sentiment_in_domain")
    assert len(pairs) >= 120
    assert len(general) >= 1000
    assert set(pairs.splits) == {"train", "validation", "test"}
    prompts = {k: probe[k] for k in ("validation_prompts", "test_prompts", "neutral_texts")}
    words = [w for k in ("positive_words", "negative_words") for w in probe[k]]
    for texts in (pairs.texts, general, domain, *prompts.values(), words):
        assert as_texts(texts) == texts
        assert all(t == t.strip() for t in texts)
        assert len(set(normal(texts))) == len(texts)


def test_example_anchors_are_disjoint_from_all_that_is_measured():
    pairs, probe = example("sentiment_pairs"), example("sentiment_probe")
    measured = [*probe["validation_prompts"], *probe["test_prompts"], *probe["neutral_texts"]]
    for name in ("general", "sentiment_in_domain"):
        check_disjoint(example(name), pairs.texts)
        check_disjoint(example(name), measured)
        starts = tuple(normal([*probe["validation_prompts"], *probe["test_prompts"]]))
        assert [t for t in normal(example(name)) if t.startswith(starts)] == []
    check_disjoint(example("general"), example("sentiment_in_domain"))
    check_disjoint(measured, pairs.texts)


def test_example_splits_are_by_pair_and_share_no_text():
    pairs = example("sentiment_pairs")
    parts = [pairs.split(s) for s in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(pairs)
    for part in parts:
        assert len(part) >= 20
        assert part.labels == [1, 0] * len(part)
        assert set(part).isdisjoint(p for other in parts if other is not part for p in other)
        check_disjoint(part.texts, [t for other in parts if other is not part for t in other.texts])
    probe = example("sentiment_probe")
    check_disjoint(probe["validation_prompts"], probe["test_prompts"])


def test_there_is_no_other_example():
    with pytest.raises(
        ValueError, match="no example data 'jokes': choose one of general, sentiment_in_domain, sentiment_pairs"
    ):
        example("jokes")


def test_a_chat_that_ends_in_an_answer_is_read_to_its_end():
    tok = tokenizer()
    question = [{"role": "user", "content": "hello"}]
    asked, _ = encode(tok, question)
    answered, _ = encode(tok, [*question, {"role": "assistant", "content": "world"}])
    assert tok.decode(asked).endswith("assistant ") and tok.decode(answered).endswith("world</s>")


def test_a_text_that_brings_its_own_bos_is_refused():
    with pytest.raises(ValueError, match="would have it twice"):
        encode(tokenizer(bos=True), "<s>hello")
    assert encode(tokenizer(), "<s>hello")[1] == 0


def test_other_line_separators_stay_inside_a_json_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n{"text": "three"}\n', encoding="utf-8")
    assert as_texts(tmp_path / "a.jsonl") == ["one\u2028two", "three"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"Line 2 of b.jsonl is no JSON"):
        as_texts(tmp_path / "b.jsonl")


def test_two_lists_are_no_pairs():
    with pytest.raises(ValueError, match=r"write ContrastPairs\(positive, negative\)"):
        ContrastPairs.of((["a", "b"], ["c", "d"]))
    assert len(ContrastPairs.of([["a", "b"], ["c", "d"], ["e", "f"]])) == 3
