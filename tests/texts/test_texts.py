"""Contrast pairs, lists of texts, token ids, position rules, and the example data."""

from __future__ import annotations

import json
import math
import time

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tokenizer

from expertsteer_nnsight.texts.labelled import ContrastPairs, LabelledTexts, example
from expertsteer_nnsight.texts.overlap import check_disjoint, overlap
from expertsteer_nnsight.texts.texts import as_texts, encode, texts_hash, token_index

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
        ([], "There are no contrast pairs: the list is empty"),
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


LONG = "The small cat sat on a red mat."
VARIANTS = [
    LONG,
    LONG.upper(),
    "the  small\tcat sat on a\nred mat",
    "The small cat -- sat, on a 'red' mat!",
    "The small cat sat on a red-mat",
    f"He said: {LONG} Then he left.",
    "small cat sat on a",
    [{"role": "user", "content": LONG}],
    "Thesmallcatsatonaredmat",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_near_copies_of_a_labelled_text_are_found(variant):
    assert overlap(["something else", variant, "another one"], [LONG, "unrelated"]) == [1]
    assert overlap([LONG], ["unrelated", variant]) == [0]


@pytest.mark.parametrize(
    "other",
    ["a red mat", "the small cats sat on a red mat", "The small cat sat on a blue mat, red", "cat small the", "..."],
)
def test_what_is_no_near_copy(other):
    assert overlap([other, "!!!"], [LONG, "?!"]) == []


def test_a_short_labelled_text_may_be_part_of_an_anchor():
    assert overlap(["I had a good soup today at home"], ["good soup"]) == []
    assert overlap(["don\u2019t do it", "Cafe\u0301 au lait", "!!!"], ["Dont do it", "caf\u00e9 au lait", "!!!"]) == [
        0,
        1,
        2,
    ]


words = st.lists(st.sampled_from(["a", "bb", "c", "dd"]), min_size=1, max_size=9).map(" ".join)


@given(st.lists(words, min_size=1, max_size=6), st.lists(words, min_size=1, max_size=6))
def test_overlap_is_what_comparing_each_with_each_finds(anchors, labelled):
    def near(a, b):
        short, long = sorted((a, b), key=lambda t: len(t.split()))
        within = len(short.split()) >= 4 and f" {short} " in f" {long} "
        return a.replace(" ", "") == b.replace(" ", "") or within

    assert overlap(anchors, labelled) == [i for i, a in enumerate(anchors) if any(near(a, b) for b in labelled)]


@pytest.mark.parametrize("start", ["", "they all start with the same words "])
def test_overlap_is_quick(start):
    rng = np.random.default_rng(0)

    def some(n):
        return [start + " ".join(f"w{i}" for i in rng.integers(0, 3000, rng.integers(20, 60))) for _ in range(n)]

    anchors, labelled = some(2000), some(400)
    anchors[7] = f"x {labelled[3]} y"
    began = time.perf_counter()
    assert overlap(anchors, labelled) == [7]
    took = time.perf_counter() - began
    assert took < 1.0, took  # 0.2 s where nothing else runs


def test_anchors_must_not_be_labelled_texts():
    pairs = ContrastPairs.of(ROWS)
    check_disjoint(["something else", CHAT], pairs.texts)
    with pytest.raises(
        ValueError, match=r"1 of the 2 anchors are labelled texts too, .* \(such as 'Good SOUP!'\).*out"
    ):
        check_disjoint(["something else", "Good SOUP!"], pairs.texts)
    with pytest.raises(ValueError, match="1 of the 1 anchors"):
        check_disjoint([[{"role": "user", "content": "HELLO  world"}]], [CHAT])
    with pytest.raises(ValueError, match="2 of the 2 anchors"):
        check_disjoint(iter(["Good soup", "cold bed"]), iter(pairs.texts))


# labelled texts


def test_labelled_texts_of_pairs_keep_their_order():
    for pairs in (ROWS, TUPLES, ContrastPairs.of(ROWS)):
        found = LabelledTexts.of(pairs)
        assert found.texts == tuple(ContrastPairs.of(ROWS).texts) and found.source == "pairs"
        assert found.labels == (1, 0, 1, 0, 1, 0) and found.groups == (0, 0, 1, 1, 2, 2)
    assert LabelledTexts.of(found) is found and len(found) == 6
    assert repr(found) == "LabelledTexts(6 texts in 3 groups, pairs, labels {0.0: 3, 1.0: 3})"


def test_labels_are_classes_or_real_numbers():
    found = LabelledTexts(["a", "b", CHAT], np.array([0.5, -1.0, 2.0]))
    assert found.labels == (0.5, -1.0, 2.0) and found.groups == (0, 1, 2) and found.source == "real"
    assert "labels -1 to 2" in repr(found)
    classes = LabelledTexts.of_classes(["a", "b", "c"], ["d"])
    assert classes.labels == (1, 1, 1, 0) and classes.groups == (0, 1, 2, 3) and classes.source == "classes"
    assert LabelledTexts(["a", "b"], [1, 2], ["x", "x"], "mine").source == "mine"


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([1, 0, 1], None, "found 2 texts, 3 labels and 2 groups"),
        ([1, 0], [1], "found 2 texts, 2 labels and 1 groups"),
        ([1, math.nan], None, "Label 1 is nan: labels must be finite"),
        ([math.inf, 0], None, "Label 0 is inf"),
        ([2, 2.0], None, "All 2 labels are 2: a direction needs"),
    ],
)
def test_labels_that_cannot_be_used(labels, groups, message):
    with pytest.raises(ValueError, match=message):
        LabelledTexts(["a", "b"], labels, groups)


CHOICES = [
    {"question": "Is snow cold?", "options": ["no", "yes", "never"], "answer": 1, "split": "train"},
    {"question": "Two and two?", "options": ["four", "five"], "answer": 0, "split": "test"},
    {"question": "Is snow cold?", "options": ["very", "not at all"], "answer": np.int64(0), "split": "train"},
]


def test_choices_are_right_against_wrong_grouped_by_question(tmp_path):
    plain = [{**r, "answer": int(r["answer"])} for r in CHOICES]
    for rows in (CHOICES, write_lines(tmp_path / "q.jsonl", plain), datasets.Dataset.from_list(plain)):
        found = LabelledTexts.from_choices(rows)
        assert found.texts == (
            "Is snow cold? yes", "Is snow cold? no", "Is snow cold? never", "Two and two? four", "Two and two? five",
            "Is snow cold? very", "Is snow cold? not at all",
        )  # fmt: skip
        assert found.labels == (1, 0, 0, 1, 0, 1, 0) and found.source == "choices"
        assert found.groups == (0, 0, 0, 3, 3, 0, 0)
        pairs = ContrastPairs.from_choices(rows)
        assert pairs[0] == ("Is snow cold? yes", "Is snow cold? no") and len(pairs) == 3
        assert len(pairs.split("train")) == 2
    chat = LabelledTexts.from_choices([{"question": CHAT, "options": ["yes", "no"], "answer": 1}])
    assert chat.texts[0] == [*CHAT, {"role": "assistant", "content": "no"}] and chat.labels == (1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, "The answer of row 1 is 2: it must be an index of its 2 options"),
        ({"answer": -1}, "The answer of row 1 is -1"),
        ({"answer": "A"}, "The answer of row 1 is 'A'"),
        ({"answer": True}, "The answer of row 1 is True"),
        ({"options": ["four"]}, "Row 1 has no wrong option"),
        ({"options": ["four", "four"]}, "or one that equals the right one"),
    ],
)
def test_choices_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        LabelledTexts.from_choices([CHOICES[0], {**CHOICES[1], **changes}])
    with pytest.raises(ValueError, match=r"keys question, options and answer, but row 0 has \['question'\]"):
        ContrastPairs.from_choices([{"question": "a"}])


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
