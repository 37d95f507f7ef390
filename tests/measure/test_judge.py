"""The built-in judge: what it learns, what it says of its own accuracy, and what the packaged encoder makes of texts."""

from __future__ import annotations

import pickle
import sys
from zlib import crc32

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

import expertsteer_nnsight as es
from expertsteer_nnsight.measure import judge as judge_module
from expertsteer_nnsight.measure.judge import PENALTIES, SentenceJudge

WORDS = ("good", "bad", "tea", "bread", "rain", "train", "book")


def counts(texts):
    """A toy encoder: how often each word occurs, and the length."""
    return np.array([[*(t.split().count(w) for w in WORDS), len(t.split())] for t in texts], dtype=float)


def noise(width):
    """An encoder that knows nothing: a random vector for each text, the same every time."""

    def encode(texts):
        return np.stack([np.random.RandomState(crc32(t.encode())).standard_normal(width) for t in texts])

    return encode


def opinions(n=40):
    topics = WORDS[2:]
    return [f"the {topics[i % 5]} was {'good' if i % 2 else 'bad'} on day {i}" for i in range(n)], [
        i % 2 for i in range(n)
    ]


@pytest.fixture(scope="module")
def fitted():
    return SentenceJudge(counts).fit(*opinions())


# what it learns


def test_separable_texts(fitted):
    assert (fitted.accuracy_, fitted.auc_, fitted.n_, fitted.majority_) == (1.0, 1.0, 40, 0.5)
    texts, labels = opinions()
    assert ((fitted(texts) > 0) == torch.tensor(labels).bool()).all()


def test_log_odds_are_of_the_larger_label(fitted):
    good, bad, neither = fitted(["a good book", "a bad book", "a book"])
    assert good > neither > bad and good > 0 > bad
    texts, labels = opinions()
    for named in ([-1 if y else 7 for y in labels], ["bad" if y else "good" for y in labels]):
        other = SentenceJudge(counts).fit(texts, named)
        torch.testing.assert_close(other(texts), -fitted(texts))
    for same in ([y == 1 for y in labels], np.array(labels), torch.tensor(labels)):
        torch.testing.assert_close(SentenceJudge(counts).fit(texts, same)(texts), fitted(texts))


def test_log_odds_are_scikit_learns():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(60, 5, generator=g, dtype=torch.float64) * 100 + 30
    y = (X[:, 0] + 80 * torch.randn(60, generator=g, dtype=torch.float64) > 30).long()
    judge = SentenceJudge(lambda texts: X[[int(t) for t in texts]]).fit([str(i) for i in range(60)], y)
    scale = (X - X.mean(0)).square().sum(1).mean().sqrt()
    oracle = LogisticRegression(C=judge.C_, max_iter=10_000).fit((X - X.mean(0)) / scale, y)
    expected = torch.as_tensor(oracle.decision_function((X - X.mean(0)) / scale))
    torch.testing.assert_close(judge([str(i) for i in range(60)]), expected)
    assert judge.coef_.shape == (5,) and judge.C_ in PENALTIES


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_unit_of_the_embeddings_does_not_matter(fitted, factor):
    texts, labels = opinions()
    other = SentenceJudge(lambda t: factor * counts(t) + 3).fit(texts, labels)
    assert other.C_ == fitted.C_
    torch.testing.assert_close(other(texts), fitted(texts), rtol=1e-4, atol=1e-4)


def test_the_penalty_follows_the_noise():
    texts, labels = opinions(200)
    shuffled = np.random.RandomState(0).permutation(labels)
    noisy = SentenceJudge(noise(100)).fit(texts, shuffled)
    assert (PENALTIES[-1], PENALTIES[0]) == (SentenceJudge(counts).fit(texts, labels).C_, noisy.C_)


# what it says of itself


def test_shuffled_labels_are_judged_by_chance():
    texts, labels = opinions(400)
    shuffled = np.random.RandomState(0).permutation(labels)
    judge = SentenceJudge(counts).fit(texts, shuffled)
    assert abs(judge.accuracy_ - 0.5) < 0.08 and abs(judge.auc_ - 0.5) < 0.08 and judge.n_ == 400
    # with more columns than texts every training text is separated, and none of it shows in the held-out figures
    judge = SentenceJudge(noise(500)).fit(texts, shuffled)
    assert ((judge(texts) > 0).numpy() == shuffled).mean() > 0.85
    assert abs(judge.accuracy_ - 0.5) < 0.08 and abs(judge.auc_ - 0.5) < 0.08


def test_texts_of_a_group_are_held_out_together():
    # each text stands four times, labelled at random: whoever saw a copy knows, nobody else can
    def one_hot(texts):
        return np.eye(100)[[int(t) for t in texts]]

    texts, labels = [str(i) for i in range(100)] * 4, [i % 2 for i in np.random.RandomState(0).permutation(100)] * 4
    seen, unseen = (SentenceJudge(one_hot).fit(texts, labels, g) for g in (None, [f"g{t}" for t in texts]))
    assert seen.accuracy_ > 0.95 and (seen.C_, seen.n_) == (PENALTIES[-1], 400)
    assert unseen.accuracy_ <= 0.5 and unseen.auc_ <= 0.5 and unseen.n_ == 400
    assert unseen.C_ in PENALTIES[:-1]  # the penalty too is chosen on groups held out


def test_a_fold_whose_embeddings_are_all_the_same():
    judge = SentenceJudge(lambda texts: counts(texts)[:, :1]).fit(["a good book", *["a book"] * 9], [1, 0] * 5)
    assert judge.n_ == 10 and judge(["a good book"]) > 0


def test_the_held_out_figures_are_those_of_the_folds(monkeypatch):
    texts, labels = opinions(50)
    labels[:9] = [1 - y for y in labels[:9]]
    y, groups = np.array(labels, dtype=float), np.arange(50) // 2
    judge = SentenceJudge(counts, folds=4, random_state=3).fit(texts, labels, groups)
    monkeypatch.setattr(judge_module, "PENALTIES", (judge.C_,))
    right, parts = 0, []
    for train, test in judge_module.grouped_folds(y, groups, 4, 3):
        assert not set(groups[train]) & set(groups[test])
        own = SentenceJudge(counts).fit([texts[i] for i in train], y[train], groups[train])
        odds = own([texts[i] for i in test]).numpy()
        right += ((odds > 0) == y[test]).sum()
        parts.append(len(test))
    again = SentenceJudge(counts, folds=4, random_state=3).fit(texts, labels, groups)
    assert again.accuracy_ == right / sum(parts) < 1 and again.n_ == sum(parts) == 50


def test_folds_without_both_classes_are_not_counted():
    texts, labels = opinions(40)
    few = [i for i in range(40) if labels[i] == 0 or i < 6]  # 20 bad, 3 good: two of the five folds hold no good one
    judge = SentenceJudge(counts).fit([texts[i] for i in few], [labels[i] for i in few])
    assert judge.n_ == 15 and judge.accuracy_ == 1 and judge.majority_ == 12 / 15


def test_deterministic():
    texts, labels = opinions(60)
    labels[:15] = [1 - y for y in labels[:15]]
    one, same = (SentenceJudge(counts).fit(texts, labels) for _ in range(2))
    assert torch.equal(one(texts), same(texts))
    assert (one.accuracy_, one.auc_, one.C_) == (same.accuracy_, same.auc_, same.C_)
    others = {SentenceJudge(counts, random_state=seed).fit(texts, labels).auc_ for seed in range(5)}
    assert len(others) > 1


def test_it_tells_how_good_it_is(fitted):
    told = "accuracy 1.00, AUC 1.00 on 40 held-out texts (a constant judge: accuracy 0.50)"
    assert fitted.describe() == told
    assert repr(fitted).startswith("SentenceJudge(encoder=<function counts") and repr(fitted).endswith(f": {told}")
    assert repr(SentenceJudge()) == "SentenceJudge()"


# scikit-learn's contract, and what it is given


def test_estimator(fitted):
    assert fitted.get_params() == {"encoder": counts, "folds": 5, "random_state": 0}
    fresh = clone(fitted)
    with pytest.raises(NotFittedError, match="SentenceJudge instance is not fitted yet"):
        fresh(["a good book"])
    with pytest.raises(NotFittedError):
        fresh.describe()
    copy = pickle.loads(pickle.dumps(fitted))
    assert torch.equal(copy(["a good book"]), fitted(["a good book"]))


def test_texts_may_be_empty(fitted):
    odds = fitted(["", "a good book", ""])
    assert odds.shape == (3,) and odds.dtype == torch.float64 and odds.isfinite().all() and odds[0] == odds[2]
    assert fitted([]).shape == (0,) and fitted([]).dtype == torch.float64
    texts, labels = opinions()
    assert SentenceJudge(counts).fit([*texts, ""], [*labels, 0]).n_ == 41


def test_texts_may_come_from_anywhere(fitted):
    texts = ["a good book", "a bad book"]
    for other in (tuple(texts), np.array(texts), iter(texts)):
        assert torch.equal(fitted(other), fitted(texts))


@pytest.mark.parametrize("kind", [np.float32, torch.float16, list])
def test_encoders_may_give_what_they_like(fitted, kind):
    def encode(texts):
        X = counts(texts)
        return (
            torch.as_tensor(X, dtype=kind) if isinstance(kind, torch.dtype) else X.tolist() if kind is list else kind(X)
        )

    texts, labels = opinions()
    assert torch.equal(SentenceJudge(encode).fit(texts, labels)(texts), fitted(texts))


def test_a_callable_needs_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(judge_module, "_load", None)
    assert SentenceJudge(counts).fit(*opinions()).accuracy_ == 1


TEXTS, LABELS = opinions(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a good book", [1]), r"^One string was given where a list of texts is needed: write \[text\]\.$"),
        (([], []), r"^There are no texts to learn from\.$"),
        ((["a", [{"role": "user"}]], [0, 1]), r"^Text 1 is no string but a list: a judge reads what a model wrote\.$"),
        ((TEXTS, LABELS[:7]), r"^labels must have one entry for each of the 8 texts, but has shape \(7,\)\.$"),
        ((TEXTS, None), r"^labels must have one entry for each of the 8 texts, but has shape \(\)\.$"),
        ((TEXTS, [1] * 8), r"^labels must hold two classes, but the 8 texts have 1: 1\.$"),
        ((TEXTS, range(8)), r"^labels must hold two classes, but the 8 texts have 8: 0, 1, 2, 3, 4, \.\.\.\.$"),
        ((TEXTS, [1, float("nan")] * 4), r"^labels must hold two classes, but the 8 texts have 2: 1\.0, nan\.$"),
        ((TEXTS, LABELS, [0, 1]), r"^groups must have one entry for each of the 8 rows, but has shape \(2,\)\.$"),
        (
            (TEXTS, LABELS, [0] * 8),
            r"^No fold of the 8 texts has both classes in what is held out and in the rest: give",
        ),
        (
            (TEXTS[:2], LABELS[:2]),
            r"^No fold of the 2 texts has both classes in what is held out and in the rest: give",
        ),
    ],
)
def test_what_cannot_be_learnt_from(arguments, message):
    with pytest.raises(ValueError, match=message):
        SentenceJudge(counts).fit(*arguments)


@pytest.mark.parametrize("folds", [0, 1])
def test_no_folds(folds):
    with pytest.raises(ValueError, match=rf"^folds is {folds}: at least 2 are needed to hold texts out\.$"):
        SentenceJudge(counts, folds=folds).fit(TEXTS, LABELS)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda texts: counts(texts)[1:], r"^The encoder gives 7 rows for 8 texts\.$"),
        (
            lambda texts: counts(texts)[0],
            r"^Expected 2D array: The encoder's output must be \[rows, columns\], but has",
        ),
        (lambda texts: counts(texts) * np.nan, r"^The encoder's output has NaN or infinity in 8 of 8 rows\.$"),
        (lambda texts: np.ones((len(texts), 3)), r"^The encoder gives all 8 texts the same embedding\.$"),
    ],
)
def test_encoders_that_do_not_encode(encoder, message):
    with pytest.raises(ValueError, match=message):
        SentenceJudge(encoder).fit(TEXTS, LABELS)


def test_what_cannot_be_judged(fitted):
    with pytest.raises(ValueError, match=r"^One string was given"):
        fitted("a good book")
    with pytest.raises(ValueError, match=r"^Text 0 is no string but a int"):
        fitted([3])
    with pytest.raises(ValueError, match=r"^There are no texts to encode\.$"):
        fitted.encode([])
    narrow = clone(fitted).fit(*opinions()).set_params(encoder=lambda texts: counts(texts)[:, :3])
    with pytest.raises(ValueError, match=r"^The encoder gives embeddings of width 3, but gave 8 at fit\.$"):
        narrow(["a good book"])


# transformers encoders


@pytest.fixture
def folder(tmp_path):
    """A BERT with random weights and few words, whose tokenizer pads to 128 by itself as the packaged one does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS, "the", "was", "day", "on"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.enable_padding(length=128, pad_token="[PAD]")
    tokenizer.enable_truncation(128)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=300, **size)).save_pretrained(tmp_path)
    return tmp_path


def test_embeddings_are_means_over_real_tokens(folder):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [" ".join(WORDS[: i % 8]) for i in range(150)]  # more than two batches, empty ones among them
    found = SentenceJudge(folder).encode(texts)
    assert found.shape == (150, 16) and found.dtype == torch.float64 and not found.requires_grad
    for i in (0, 1, 7, 8, 77, 149):
        ids = tokenizer(texts[i], padding=False)["input_ids"]
        assert len(ids) == i % 8 + 2
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found[i], (mean / mean.norm()).double(), rtol=0, atol=1e-6)


def test_long_texts_are_cut_at_256_tokens(folder):
    judge = SentenceJudge(str(folder))
    long = ["good"] * 254  # and two special tokens
    same, other, shorter = judge.encode([" ".join(t) for t in (long, [*long, "bad", "tea"], long[:200])])
    torch.testing.assert_close(same, other)
    assert (same - shorter).abs().max() > 1e-6
    assert not torch.allclose(judge.encode([" ".join([*long[:200], "bad"])])[0], shorter, atol=1e-6)


def test_a_judge_on_an_encoder_in_a_folder(folder):
    judge = SentenceJudge(folder).fit(*opinions())
    assert judge.accuracy_ > 0.9  # random weights keep words apart
    assert len(pickle.dumps(judge)) < 5000


@pytest.fixture(scope="module")
def real():
    train = es.example("sentiment_pairs").split("train")
    return SentenceJudge().fit(train.texts, train.labels, train.groups)


@pytest.mark.real
def test_real_judge_of_the_sentiment_pairs(real):
    test = es.example("sentiment_pairs").split("test")
    held_out = float(((real(test.texts) > 0) == torch.tensor(test.labels).bool()).double().mean())
    print(real, "split test:", held_out)
    assert real.n_ == 240 and real.majority_ == 0.5
    # the pairs show and do not tell, which this encoder finds hard; 80 texts have a standard error of 0.05
    assert held_out > 0.65 and real.accuracy_ > 0.62 and real.auc_ > 0.7
    assert abs(real.accuracy_ - held_out) < 0.12


@pytest.mark.real
def test_real_judge_of_plain_words(real):
    probe = es.example("sentiment_probe")
    texts = {
        k: [f"{p} {w}" for p in probe["test_prompts"][:8] for w in probe[f"{k}_words"]]
        for k in ("positive", "negative")
    }
    good, bad = real(texts["positive"]), real(texts["negative"])
    accuracy = float(torch.cat([good > 0, bad < 0]).double().mean())
    area = float((good[:, None] > bad).double().mean())
    print(f"plain words: accuracy {accuracy:.3f}, AUC {area:.3f}")
    assert accuracy > 0.8 and area > 0.9


@pytest.mark.real
def test_real_embeddings():
    judge = SentenceJudge()
    texts = [*es.example("sentiment_pairs").texts[:27], "", " ".join(["word"] * 500), "x"]
    batch = judge.encode(texts)
    assert batch.shape == (30, 384)
    torch.testing.assert_close(batch.norm(dim=1), torch.ones(30, dtype=torch.float64), rtol=0, atol=1e-6)
    single = torch.cat([judge.encode([text]) for text in texts])
    assert (batch - single).abs().max() < 1e-5
    # the numbers of the model's own page for this sentence
    first = judge.encode(["This is an example sentence"])[0, :4]
    expected = torch.tensor([0.0677, 0.0635, 0.0487, 0.0793], dtype=torch.float64)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-4)
