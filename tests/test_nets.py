"""The tiny networks: the tokenizer's words."""

from __future__ import annotations

import pytest

from gps_guidance.miniature.nets import MAX_TOKENS, tiny_tokenizer

CAPTIONS = [
    "A photo of Arc de Triomphe",  # the ph of photo is in triomphe
    "cat at bat attest, aaaa aaa", "the old church at 10 o'clock!", "a café in the Straße",
]


@pytest.mark.parametrize("text", CAPTIONS)
def test_every_word_of_the_captions_is_one_token(text: str) -> None:
    tokenizer = tiny_tokenizer(CAPTIONS)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == (
        text.lower().replace(" ", "")
    )
    words = {
        CAPTIONS[0]: 6, CAPTIONS[1]: 7, CAPTIONS[2]: 10, CAPTIONS[3]: 5,  # a sign, a digit: a word
    }
    assert len(ids) == 2 + words[text] <= MAX_TOKENS


def test_other_texts_still_encode() -> None:
    tokenizer = tiny_tokenizer(["a car"])
    ids = tokenizer("A čar, 3 cars").input_ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == "ačar,3cars"
