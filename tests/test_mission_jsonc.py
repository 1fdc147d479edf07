"""Jsonc: what does the configuration text say?"""

from __future__ import annotations

import itertools
import json
import random
import re
import time

import pytest

import support

mission = support.load("mission")


def read(text: str):
    return mission.JsoncReader(text).document()


def short(value) -> str:
    return repr(value)[:24]


def refused(text: str):
    with pytest.raises(mission.JsoncError) as caught:
        read(text)
    return caught.value


# --- what it reads --------------------------------------------------------


@pytest.mark.parametrize("text, value", [
    ("{}", {}), ("[]", []), ('""', ""), (" \t\r\n{ }\n", {}),
    ("[1, -2, 0, 1.5, -0.5e3, 1E+2]", [1, -2, 0, 1.5, -500.0, 100.0]),
    ("[true, false, null]", [True, False, None]),
    ('{"a": {"b": [1]}}', {"a": {"b": [1]}}),
    ('"\\u00e9\\n\\"\\\\\\/"', '\u00e9\n"\\/'),
    ('"\\ud83d\\ude00"', "\U0001f600"), ('"\u00e9\u4e2d"', "\u00e9\u4e2d"),
    ('"\x7f\u2028"', "\x7f\u2028"),
    # comments
    ("// first\n{} // last", {}), ("{}//", {}), ("/**/{}/* */", {}),
    ("{} /* a * new / line // in it */", {}),
    ("// ends * at \\ the line's end / n\n[1]", [1]),
    ("[1 // one\n, /* two */ 2]", [1, 2]),
    ('{"a"/**/:/**/1}', {"a": 1}), ("[1/**/]", [1]), ("[true//\n]", [True]),
    ("// CR LF\r\n[1]\r\n", [1]), ("/***/[1]/* **/", [1]),
    # ... and none inside a string
    ('"http://x/*y*/"', "http://x/*y*/"), ('["a // b", 1]', ["a // b", 1]),
    ('"say \\"hi // there\\" x"', 'say "hi // there" x'),
    ('"\\\\" // "', "\\"), ('"a,]"', "a,]"),
    # trailing commas
    ("[1,]", [1]), ('{"a": 1,}', {"a": 1}), ("[[1,],]", [[1]]),
    ("[1, // one\n]", [1]), ('{"a": [1 , ] , }', {"a": [1]}),
])
def test_json_with_comments_and_trailing_commas_is_read(text, value):
    assert read(text) == value


# --- what it refuses, and where -------------------------------------------


@pytest.mark.parametrize("text, words", [   # @: where the mistake is
    ("@", "unexpected end of file"), ("  \n @", "unexpected end of file"),
    ("// only a comment@", "unexpected end of file"),
    ("{} @{}", "expected the end of the file"),
    ("[1]@]", "the end of the file"),
    ("{@", "unexpected end of file"),
    ("{@,}", "expected a key in double quotes"),
    ("{@a: 1}", "expected a key in double quotes"),
    ("{@'a': 1}", "expected a key in double quotes"),
    ('{"a" @1}', 'expected ":", found "1"'), ('{"a"@}', 'expected ":"'),
    ('{"a": @}', 'a value, found "}"'),
    ('{"a": 1 @"b": 2}', 'or "}", found a str'),
    ('{"a": 1,@,}', "expected a key in double quotes"),
    ("[@,]", 'a value, found ","'),
    ("[1,@,]", 'a value, found ","'), ("[1 @2]", 'expected "," or "]"'),
    ("[1@", "unexpected end of file"), ("[1,@", "unexpected end of file"),
    ("[@NaN]", 'a value, found "NaN"'), ("@Infinity", "expected a value"),
    ("[@-Infinity]", "expected a value"), ("[@True]", 'a value, found "True"'),
    ("[@nul]", 'a value, found "nul"'), ("@'x'", "expected a value"),
    ("[@" + "9" * 5000 + "]", "expected a value"),
    ("@1e999", "expected a value"),
    ("[@0x10]", "expected a value"), ("[@+1]", "expected a value"),
    ("[@.5]", "expected a value"),
    ("[@01]", "expected a value"), ("[@1.]", "expected a value"),
    ("[@-]", "expected a value"),
    ("[@-01.5]", "expected a value"), ("[@1_0]", "expected a value"),
    ("[@\u0661]", "expected a value"), ("[@\u00b2]", "expected a value"),
    ('@"abc', "unterminated string"), ('["a", @"b\n"]', "unterminated"),
    ('@"ends in \\', "unterminated"), ('@"\\"', "unterminated"),
    ("[1, @/* no end", "unterminated comment"), ("@/*/", "unterminated"),
    ('"tab@\tin it"', "invalid escape or control character"),
    ('"nul@\0"', "invalid escape or control character"),
    ('"esc@\x1b"', "invalid escape or control character"),
    ('"@\\x41"', "invalid escape or control character"),
    ('"\\u12"', "invalid escape"),
    ('@"\\ud83d"', "half of a surrogate pair"),
    ('@"\\ude00\\ud83d"', "half of a surrogate pair"),
    ("@\ufeff{}", "expected a value"), ("@\x00", "expected a value"),
    ("[1]@\x00", "expected the end of the file"), ("@/", 'a value, found "/"'),
    ("{}@#", "the end of the file"), ("{}@\u00a0", "the end of the file"),
], ids=short)
def test_error_has_its_position_and_the_expected_token(text, words):
    mistake = refused(text.replace("@", "", 1))
    assert words in mistake.why
    assert mistake.hint or re.match("expected|unexpected end", mistake.why)
    if "@" in text:
        assert mistake.at == text.index("@")


def test_string_ending_in_a_backslash_is_an_error_within_the_text():
    """A backslash as the last character must not lead out of the text."""
    for text in ('"\\', '{"a\\', '["\\\\\\', '{"a": "b\\\n'):
        assert refused(text).at < len(text)


@pytest.mark.parametrize("bomb", [
    "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000,
    "[" * 60 + "]" * 60, "9" * 5000, "-" * 100_000, '"' + "\\" * 99_999,
    "/*" * 100_000, "//" * 100_000, "[" + "," * 100_000,
    '{"a":1' * 10_000, "1e" + "9" * 100_000,
], ids=short)
def test_deeply_nested_document_is_refused_quickly(bomb):
    began = time.process_time()
    refused(bomb)
    assert time.process_time() - began < 1


def test_fifty_levels_of_nesting_are_accepted():
    assert read("[" * 50 + "]" * 50)


def test_parsing_time_grows_linearly_with_the_document():
    """Comments, blanks and strings are skipped, not copied again and again."""
    text = "[" + '"a // b", /* c */ 1,  // d\n' * 30_000 + "]"
    began = time.process_time()
    assert len(read(text)) == 60_000
    assert time.process_time() - began < 5


# --- places ---------------------------------------------------------------


def test_every_key_and_value_has_its_position():
    text = """// a comment "with" : quotes
{ /* { */ "a": [10, {"b": "x"}, ], // }
  "c": {"d": null,}, "e": -5 }"""
    reader = mission.JsoncReader(text)
    reader.document()

    def shown(places: dict) -> dict:
        return {path: text[at:at + 3] for path, at in places.items()}
    assert shown(reader.places) == {
        (): "{ /", ("a",): "[10", ("a", 0): "10,", ("a", 1): '{"b',
        ("a", 1, "b"): '"x"', ("c",): '{"d', ("c", "d"): "nul",
        ("e",): "-5 "}
    assert shown(reader.keys) == {
        ("a",): '"a"', ("a", 1, "b"): '"b"', ("c",): '"c"',
        ("c", "d"): '"d"', ("e",): '"e"'}


def test_every_duplicate_key_is_recorded():
    text = '{"a": 1, "b": {"a": 2, "a": 3}, "a": 4, "\\u0061": 5}'
    reader = mission.JsoncReader(text)
    reader.document()
    assert [(path, text[at:at + 3]) for path, at in reader.duplicates] == [
        (("b", "a"), '"a"'), (("a",), '"a"'), (("a",), '"\\u')]


# --- it is JSON -----------------------------------------------------------


def some_json(dice: random.Random, depth: int = 0):
    kind = dice.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [some_json(dice, depth + 1) for _ in range(dice.randrange(5))]
    if kind == 7:
        return {some_text(dice): some_json(dice, depth + 1)
                for _ in range(dice.randrange(5))}
    return [None, True, False, dice.randrange(-10**9, 10**9),
            round(dice.uniform(-1e6, 1e6), dice.randrange(9)),
            some_text(dice)][kind]


def some_text(dice: random.Random) -> str:
    return "".join(dice.choice('ab "\\/*,:[]{}\n\t\x00\x7f\u00e9\u4e2d'
                               "\u2028\U0001f600")
                   for _ in range(dice.randrange(8)))


def test_document_without_comments_is_parsed_as_by_json():
    dice = random.Random(1)
    for _ in range(500):
        value = some_json(dice)
        text = json.dumps(value, indent=dice.choice([None, 0, 2]),
                          ensure_ascii=dice.choice([True, False]))
        assert read(text) == json.loads(text)


def test_bare_word_is_a_value_only_if_it_is_one_in_json():
    letters = "019.-+eE"
    for size in range(1, 6):
        for word in map("".join, itertools.product(letters, repeat=size)):
            try:
                wanted = json.loads(word)
            except ValueError:
                wanted = None
            if wanted is not None and abs(wanted) >= 1e300:
                continue        # an infinity, to json
            try:
                found = read(word)
            except mission.JsoncError:
                found = None
            assert found == wanted, word


def test_mutated_sample_is_parsed_or_refused_with_a_position():
    dice = random.Random(2026)
    for number in range(5000):
        text = mutated(mission.SAMPLE, dice)
        began = time.process_time()
        try:
            read(text)
        except mission.JsoncError as mistake:
            assert 0 <= mistake.at <= len(text), number
        assert time.process_time() - began < 1, number


PIECES = ['"', "\\", "//", "/*", "*/", "{", "}", "[", "]", ",", ":", "\n",
          "null", "1e9", "-", "\0", "\ufeff", "\ud800", "\\u", "\\ud83d",
          "\t", "\u2028", "9" * 400, "[" * 60, "\U0001f600"]


def mutated(text: str, dice: random.Random) -> str:
    for _ in range(dice.randrange(1, 6)):
        at = dice.randrange(len(text) + 1)
        end = min(len(text), at + dice.choice([0, 0, 1, 1, 5, 200]))
        text = text[:at] + dice.choice(
            PIECES + ["", text[at:end] * 2, chr(dice.randrange(256))]
        ) + text[end:]
    return text
