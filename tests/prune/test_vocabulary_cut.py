"""Which tokens of a BPE vocabulary go, worked out by hand and by tokenising again."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from compress.models.checkpoint import load_model
from compress.models.head import head_of
from compress.prune.vocabulary import Usage, expected_counts, kept_ids

# a b c d, then ab, cd, abcd and ac: abcd and ac are the leaves.
IDS = {token: i for i, token in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd", "ac"])}
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd"), ("a", "c")]


def kept_tokens(counts, keep, protected=(0, 1, 2, 3), expected=()):
    counts, expected = ({IDS[t]: n for t, n in dict(of).items()} for of in (counts, expected))
    kept = kept_ids(IDS, MERGES, Usage(Counter(counts), expected), keep, protected)
    return [token for token, i in IDS.items() if i in kept.ids], kept.tokens_added


def test_the_least_used_leaf_goes_first_and_its_count_moves_to_its_parts():
    assert kept_tokens({"abcd": 5, "ac": 9, "ab": 1, "cd": 7}, 7) == (
        ["a", "b", "c", "d", "ab", "cd", "ac"],
        5,
    )
    # ab has 1 + 5 once abcd is gone, cd 7 + 5, ac 9: ab is next, though it was used once.
    assert kept_tokens({"abcd": 5, "ac": 9, "ab": 1, "cd": 7}, 6) == (
        ["a", "b", "c", "d", "cd", "ac"],
        5 + 6,
    )


def test_what_others_are_built_of_stays_as_long_as_they_do():
    kept, _ = kept_tokens({"abcd": 100, "ac": 50}, 7)
    assert kept == ["a", "b", "c", "d", "ab", "cd", "abcd"]


def test_of_unused_leaves_the_youngest_goes_first():
    assert kept_tokens({}, 7)[0] == ["a", "b", "c", "d", "ab", "cd", "abcd"]
    assert kept_tokens({}, 6)[0] == ["a", "b", "c", "d", "ab", "cd"]


def test_what_a_model_expects_counts_beside_what_text_uses_and_makes_it_no_longer():
    # ac, the youngest, is expected; abcd is not, and ab not once it has what abcd had.
    assert kept_tokens({}, 7, expected={"ac": 0.1})[0] == ["a", "b", "c", "d", "ab", "cd", "ac"]
    kept, added = kept_tokens({"ab": 1, "cd": 2}, 6, expected={"abcd": 0.5, "ac": 1.6})
    assert (kept, added) == (["a", "b", "c", "d", "cd", "ac"], 1)


def test_protected_ids_never_go_and_too_few_are_refused_with_the_fewest_possible():
    assert kept_tokens({}, 5, protected=(0, 1, 2, 3, 7))[0] == ["a", "b", "c", "d", "ac"]
    with pytest.raises(ValueError, match="5 tokens can't be kept alone: .* are 7; keep at least"):
        kept_tokens({}, 5, protected=(0, 1, 2, 3, 6))


def test_all_merges_of_a_token_go_with_it():
    ids = {token: i for i, token in enumerate(["a", "b", "aa", "ab", "aab"])}
    merges = [("a", "a"), ("a", "b"), ("aa", "b"), ("a", "ab")]
    usage = Usage(Counter({0: 1, 2: 9, 3: 4}), {})
    assert kept_ids(ids, merges, usage, 3, (0, 1)).ids == [0, 1, 2]


WORDS = "the then there other another mother brothers bother bathe lather rather weather whether"


@pytest.mark.parametrize("keep", [260, 270, 285])
def test_what_is_left_is_closed_counts_truly_and_writes_any_text(keep):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    state = json.loads(tokenizer.to_str())
    ids = state["model"]["vocab"]
    merges = [tuple(merge) for merge in state["model"]["merges"]]
    text = " ".join([WORDS, "then the weather", "mother and brother"])
    counts = Counter(tokenizer.encode(text).ids)
    kept = kept_ids(ids, merges, Usage(counts, {}), keep, [ids[letter] for letter in alphabet])
    assert len(kept.ids) == keep

    # The tokenizer without them: every token is its own segmentation, any text comes back.
    left = {token: i for token, i in ids.items() if i in set(kept.ids)}
    rules = [merge for merge in merges if "".join(merge) in left]
    assert all({*merge} <= left.keys() for merge in rules)
    smaller = models.BPE(left, rules)
    assert all([part.id for part in smaller.tokenize(token)] == [i] for token, i in left.items())
    tokenizer.model = smaller
    again = tokenizer.encode(text).ids
    assert len(again) == counts.total() + kept.tokens_added
    for words in (text, "Ünïcödé \U0001f600\x00 ok"):
        assert tokenizer.decode(tokenizer.encode(words).ids) == words


def test_expected_counts_are_the_models_probabilities_summed_in_float64(tiny_teacher):
    model = load_model(tiny_teacher)
    ids_BL = torch.randint(3, 300, (6, 100), generator=torch.Generator().manual_seed(0))
    expected = expected_counts(model, head_of(model), ids_BL, "fp32", lambda line: None)
    with torch.no_grad():
        by_hand_V = model.double()(ids_BL).logits.softmax(-1).sum((0, 1))
    assert sum(expected.values()) == pytest.approx(600)
    torch.testing.assert_close(
        torch.tensor(list(expected.values()), dtype=torch.float64), by_hand_V, rtol=1e-4, atol=1e-6
    )
