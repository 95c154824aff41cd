"""What a certificate says to people, and that it goes through a file."""

from __future__ import annotations

import pytest

from shallower.certifying.certificate import Certificate, Estimate, Greedy, GreedyAgreement, percent
from shallower.core.codec import decode, encode
from shallower.errors import DataError, MethodError

KL = Estimate(0.01234, 0.011, 0.014)
TEXT = GreedyAgreement(64, 16, 32, Estimate(17.25, 14.0, 20.5), 9)


def test_answers_are_told_with_their_bound() -> None:
    certificate = Certificate(436, KL, changed=7, bound=0.0299438)
    assert certificate.rate == 7 / 436
    assert certificate.short == "1.61 %, at most 2.99 %"
    assert str(certificate).splitlines() == [
        "Of 436 rows 7 get another answer than from the original: 1.61 %, and with 95% confidence at most 2.99 %.",
        "Mean divergence from the original (KL): 0.0123 (0.011 to 0.014) nats.",
    ]


def test_tokens_and_texts_stand_beside_the_bound() -> None:
    rate = Estimate(0.02, 0.01, 0.03)
    text = str(Certificate(100, KL, 2, 0.06, 5000, rate, greedy=TEXT, left_out=3))
    assert "At one position drawn from each of 100 rows, 2 answers change" in text
    assert "Of all 5,000 positions 2.00 % change (1.00 % to 3.00 %)" in text
    assert "the first 17.2 agree (14.0 to 20.5; 64 texts after prompts of 16 tokens, 9 of them the same" in text
    assert "3 rows were left out" in text


def test_features_have_no_answers_and_this_is_said() -> None:
    certificate = Certificate(50, Estimate(0.02, 0.01, 0.03), cosine=Estimate(0.99, 0.98, 0.995))
    assert certificate.rate is None
    assert certificate.kind == "features"
    assert certificate.short == "error 2.00%"
    assert "no answer can change" in str(certificate)
    assert "KL" not in str(certificate)


def test_a_certificate_goes_through_a_file() -> None:
    for certificate in (
        Certificate(50, KL, cosine=Estimate(0.99, 0.98, 0.995)),
        Certificate(100, KL, 2, 0.06, 5000, Estimate(0.02, 0.01, 0.03), greedy=TEXT, left_out=3, seed=4),
    ):
        assert decode(Certificate, encode(certificate), at="result.json", error=DataError) == certificate


def test_small_parts_keep_their_digits() -> None:
    assert [percent(part) for part in (0.0, 0.0000123, 0.5)] == ["0.00 %", "0.0012 %", "50.00 %"]


def test_texts_need_a_prompt_and_a_token() -> None:
    with pytest.raises(MethodError, match="prompt"):
        Greedy(prompt=0)
    with pytest.raises(MethodError, match="tokens"):
        Greedy(tokens=0)
