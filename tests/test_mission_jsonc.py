"""Jsonc: what does the configuration text say?"""

from __future__ import annotations

import itertools
import json
import random
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


@pytest.mark.parametrize("text, words", [   # @ stands where the fault is
    ("@", "the text ends too early"), ("  \n @", "the text ends too early"),
    ("// only a comment@", "the text ends too early"),
    ("{} @{}", "more text after the end"), ("[1]@]", "more text"),
    ("{@", "a key is missing here"), ("{@,}", "a key is missing"),
    ("{@a: 1}", "a key is missing"), ("{@'a': 1}", "a key is missing"),
    ('{"a" @1}', 'no colon after "a"'), ('{"a"@}', 'no colon after "a"'),
    ('{"a": @}', '"}" is no value'), ('{"a": 1 @"b": 2}', "without a comma"),
    ('{"a": 1,@,}', "a key is missing"), ("[@,]", '"," is no value'),
    ("[1,@,]", '"," is no value'), ("[1 @2]", "without a comma"),
    ("[1@", "without a comma"), ("[1,@", "the text ends too early"),
    ("[@NaN]", '"NaN" is no value'), ("@Infinity", "no value"),
    ("[@-Infinity]", "no value"), ("[@True]", '"True" is no value'),
    ("[@nul]", '"nul" is no value'), ("@'x'", "no value"),
    ("[@" + "9" * 5000 + "]", "is no value"), ("@1e999", "no value"),
    ("[@0x10]", "no value"), ("[@+1]", "no value"), ("[@.5]", "no value"),
    ("[@01]", "no value"), ("[@1.]", "no value"), ("[@-]", "no value"),
    ("[@-01.5]", "no value"), ("[@1_0]", "no value"),
    ("[@\u0661]", "no value"), ("[@\u00b2]", "no value"),
    ('@"abc', "this string has no end"), ('["a", @"b\n"]', "has no end"),
    ('@"ends in \\', "has no end"), ('@"\\"', "has no end"),
    ("[1, @/* no end", "this comment has no end"), ("@/*/", "no end"),
    ('"tab@\tin it"', "this string is broken"),
    ('"nul@\0"', "this string is broken"),
    ('"esc@\x1b"', "this string is broken"),
    ('"@\\x41"', "this string is broken"), ('"\\u12"', "is broken"),
    ('@"\\ud83d"', "half of a surrogate pair"),
    ('@"\\ude00\\ud83d"', "half of a surrogate pair"),
    ("@\ufeff{}", "no value"), ("@\x00", "no value"),
    ("[1]@\x00", "more text after the end"), ("@/", '"/" is no value'),
    ("{}@#", "more text"), ("{}@\u00a0", "more text"),
], ids=short)
def test_a_fault_is_told_with_its_place(text, words):
    fault = refused(text.replace("@", "", 1))
    assert words in fault.why
    assert fault.hint
    if "@" in text:
        assert fault.at == text.index("@")


def test_a_string_whose_end_is_escaped_ends_within_the_text():
    """A backslash as the last character must not lead out of the text."""
    for text in ('"\\', '{"a\\', '["\\\\\\', '{"a": "b\\\n'):
        assert refused(text).at < len(text)


@pytest.mark.parametrize("bomb", [
    "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000,
    "[" * 60 + "]" * 60, "9" * 5000, "-" * 100_000, '"' + "\\" * 99_999,
    "/*" * 100_000, "//" * 100_000, "[" + "," * 100_000,
    '{"a":1' * 10_000, "1e" + "9" * 100_000,
], ids=short)
def test_a_bomb_is_refused_at_once(bomb):
    began = time.process_time()
    refused(bomb)
    assert time.process_time() - began < 1


def test_fifty_levels_are_deep_enough():
    assert read("[" * 50 + "]" * 50)


def test_a_long_document_takes_time_in_proportion():
    """Comments, blanks and strings are skipped, not copied again and again."""
    text = "[" + '"a // b", /* c */ 1,  // d\n' * 30_000 + "]"
    began = time.process_time()
    assert len(read(text)) == 60_000
    assert time.process_time() - began < 5


# --- places ---------------------------------------------------------------


def test_the_place_of_every_value_and_key_is_true():
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


def test_a_key_that_stands_twice_is_noted_each_time():
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


def test_documents_without_comments_read_as_json_reads_them():
    dice = random.Random(1)
    for _ in range(500):
        value = some_json(dice)
        text = json.dumps(value, indent=dice.choice([None, 0, 2]),
                          ensure_ascii=dice.choice([True, False]))
        assert read(text) == json.loads(text)


def test_a_bare_word_is_a_value_exactly_when_it_is_one_in_json():
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


def test_no_mutation_of_the_sample_is_worse_than_unreadable():
    dice = random.Random(2026)
    for number in range(5000):
        text = mutated(mission.SAMPLE, dice)
        began = time.process_time()
        try:
            read(text)
        except mission.JsoncError as fault:
            assert 0 <= fault.at <= len(text), number
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
