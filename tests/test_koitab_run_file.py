"""RunFile: frames, headers, the stored part of an output, masked secrets."""

from __future__ import annotations

import itertools
import os
import random
import tempfile

import pytest

import support

koitab = support.load("koitab")
NOTE, STDOUT, STDERR, END = range(4)


# ==========================================================================
# Frames
# ==========================================================================

FRAMES = [
    [],
    [(STDOUT, 0, b"")],
    [(STDOUT, 1, b"one\n"), (STDERR, 2, b"two"), (NOTE, 3, b"three"),
     (END, 4, b"{}")],
    [(STDOUT, 2**32 - 1, bytes(range(256)) * 300)],
    [(STDERR, 7, koitab.frame(STDOUT, 1, b"a frame in a frame"))],
]


@pytest.mark.parametrize("frames", FRAMES)
def test_frames_are_read_as_they_were_written(frames):
    data = b"".join(koitab.frame(*each) for each in frames)
    assert koitab.read_frames(data) == frames


def test_a_frame_is_nine_bytes_and_its_text_on_every_machine():
    assert koitab.frame(2, 258, b"ab") == b"\2\2\1\0\0\2\0\0\0ab"


def test_time_of_a_frame_stops_at_its_largest_value_after_49_days():
    (_, milliseconds, _), = koitab.read_frames(koitab.frame(1, 2**40, b"x"))
    assert milliseconds == 2**32 - 1


@pytest.mark.parametrize("size, found", [
    (0, []), (8, []), (9, [b""]), (10, [b"a"]), (12, [b"abc"]),
    (20, [b"abc"]), (22, [b"abc", b"d"])])
def test_truncated_frames_are_read_up_to_the_last_whole_one(size, found):
    data = koitab.frame(1, 0, b"abc") + koitab.frame(1, 0, b"def")
    assert [part for _, _, part in koitab.read_frames(data[:size])] == found


def test_text_of_an_output_contains_both_streams_and_the_notes():
    data = b"".join(koitab.frame(*each) for each in [
        (STDOUT, 0, b"a\n"), (NOTE, 1, b"cut"), (STDERR, 2, b"\xff\0"),
        (STDOUT, 3, b"b"), (END, 4, b'{"exit": 0}')])
    assert koitab.output_text(data) == b"a\n[koi: cut]\n\xff\0b"


# ==========================================================================
# The header of a run's file
# ==========================================================================

def header(**values):
    made = koitab.RunFileHeader()
    for name, value in values.items():
        assert name in koitab.RunFileHeader.FIELDS
        setattr(made, name, value)
    return made


def test_a_header_is_read_as_it_was_written():
    values = dict(zip(koitab.RunFileHeader.FIELDS, range(1, 17)))
    values.update(started=1.5, ended=2.25, status=-1, job_start=2**63,
                  total=2**40, lost=2**40 - 1, job=2**22)
    found = koitab.parse_header(header(**values).pack() + b"more")
    assert vars(found) == values


def test_header_has_a_fixed_size_and_begins_with_its_version():
    data = header().pack()
    assert data[:4] == b"KOI1"
    assert len(data) == koitab.HEADER.size <= koitab.HEADER_BYTES


@pytest.mark.parametrize("data", [
    b"", b"KOI1", header().pack()[:-1], b"KOI2" + header().pack()[4:],
    b"\0" * 256])
def test_invalid_header_is_parsed_as_none(data):
    assert koitab.parse_header(data) is None


# ==========================================================================
# What is kept of an output
# ==========================================================================

def file_of(head: bytes, first: bytes, second: bytes, **fields) -> tuple:
    """A run's file with these frames in its three parts."""
    parts = [b"" if part is None else koitab.frame(STDOUT, 0, part)
             for part in (head, first, second)]
    made = header(**dict(zip(("head", "first", "second"), map(len, parts))),
                  **fields)
    data = made.pack()
    for begin, part in zip(koitab.SEGMENTS, parts):
        data = data.ljust(begin, b"\0") + part
    return data + b"what was here before", made


@pytest.mark.parametrize("turn, first, second, lost, text", [
    (0, None, None, 0, "head"),
    (2, b"1", None, 0, "head1"),
    (2, b"1", b"2", 0, "head12"),               # the second is the newest
    (1, b"1", b"2", 1, "head[koi: 1 byte left out here]\n21"),
    (2, b"1", b"2", 2000, "head[koi: 2,000 bytes left out here]\n12"),
    (1, b"1", None, 0, "head1"),                # the first is being written
    (0, None, None, 5, "head[koi: 5 bytes left out here]\n"),   # a full disk
])
def test_segments_are_read_in_their_order(turn, first, second, lost, text):
    data, made = file_of(b"head", first, second, segment=turn, lost=lost)
    assert koitab.output_text(koitab.stored_frames(data, made)
                              ).decode() == text


def test_bytes_after_the_segments_are_ignored():
    data, made = file_of(b"new", b"1", None, segment=2)
    assert b"before" not in koitab.stored_frames(data, made)


SMALL_HEAD, SMALL_SEGMENT = 200, 100


@pytest.fixture
def small(monkeypatch):
    """Segments of some hundred bytes instead of some hundred thousand."""
    begin = koitab.HEADER_BYTES
    monkeypatch.setattr(koitab, "KEPT_HEAD", SMALL_HEAD)
    monkeypatch.setattr(koitab, "KEPT_SEGMENT", SMALL_SEGMENT)
    monkeypatch.setattr(koitab, "SEGMENTS", (
        begin, begin + SMALL_HEAD, begin + SMALL_HEAD + SMALL_SEGMENT))


def pieces_kept(pieces: list[bytes]) -> tuple[bytes, object, int]:
    """What a supervisor keeps of an output: the frames, the header, and
    the size of the file."""
    with tempfile.TemporaryFile() as file:
        run = koitab.SupervisedRun(koitab.LaunchSpec(1, "", b"", {}),
                                   os.dup(file.fileno()))
        for piece in pieces:
            run.on_output(STDOUT, piece)
        run.save()
        os.close(run.file)
        file.seek(0)
        data = file.read()
    found = koitab.parse_header(data)
    return koitab.stored_frames(data, found), found, len(data)


@pytest.mark.parametrize("seed", range(150))
def test_head_and_tail_of_any_output_are_kept(small, seed):
    """Held against the whole output: what is kept is its beginning and its
    end, what is left out is counted to the byte, the file does not grow."""
    dice = random.Random(seed)
    whole = bytes(dice.choices(range(1, 256), k=dice.choice(
        [0, 10, 150, 190, 200, 300, 500, 1000, 5000])))
    pieces, at = [], 0
    while at < len(whole):
        size = dice.choice([1, 5, 40, 91, 92, 93, 100, 191, 300])
        pieces.append(whole[at:at + size])
        at += size
    frames, found, size = pieces_kept(pieces)
    parts = [(stream, part) for stream, _, part in koitab.read_frames(frames)]
    cut = [at for at, (stream, _) in enumerate(parts) if stream == NOTE]
    texts = [part for _, part in parts]
    assert size <= koitab.SEGMENTS[2] + SMALL_SEGMENT
    assert found.total == len(whole)
    if not cut:
        assert b"".join(texts) == whole and not found.lost
        return
    head, tail = b"".join(texts[:cut[0]]), b"".join(texts[cut[0] + 1:])
    assert texts[cut[0]] == koitab.plural(
        found.lost, "byte").encode() + b" left out here"
    assert whole.startswith(head) and whole.endswith(tail)
    assert len(head) + found.lost + len(tail) == len(whole)
    # Of the bytes alone, without the nine of each frame.
    frame_count = sum(stream == STDOUT for stream, _ in parts)
    kept = len(head) + len(tail) + 9 * frame_count
    assert kept > SMALL_HEAD + SMALL_SEGMENT - 2 * 9


def test_output_of_almost_a_megabyte_is_kept_completely():
    size = 2**20 - 100 * koitab.FRAME.size
    frames, found, _ = pieces_kept([b"x" * 65_536] * 16)
    assert found.lost and found.total == 2**20
    frames, found, _ = pieces_kept([b"x" * 65_536] * (size // 65_536))
    assert not found.lost


# ==========================================================================
# Masked secrets
# ==========================================================================

def masked(secrets: list[bytes], pieces: list[bytes]) -> bytes:
    mask = koitab.SecretMasker(secrets)
    return b"".join([mask.feed(STDOUT, piece) for piece in pieces]
                    + [mask.feed(STDOUT, b"", last=True)])


def model(secrets: list[bytes], text: bytes) -> bytes:
    """The same, from left to right, the longest secret first."""
    shown, at = b"", 0
    while at < len(text):
        found = max((secret for secret in secrets if secret
                     and text.startswith(secret, at)), key=len, default=b"")
        shown += koitab.MASK if found else text[at:at + 1]
        at += len(found) or 1
    return shown


@pytest.mark.parametrize("secrets, pieces, shown", [
    ([b"hunter2"], [b"it is hunter2."], b"it is ******."),
    ([b"hunter2"], [b"it is hun", b"ter2."], b"it is ******."),
    ([b"hunter2"], [b"hunt"] + [b"er"] + [b"2"], b"******"),
    ([b"hunter2"], [b"hunter", b"3"], b"hunter3"),
    ([b"hunter2"], [b"hunter"], b"hunter"),
    ([b"aab"], [b"a", b"a", b"a", b"b"], b"a******"),
    ([b"x", b"xyz"], [b"xyz"], b"******"),
    ([b"x", b"xyz"], [b"xy"], b"******y"),
    ([b""], [b"nothing is secret"], b"nothing is secret"),
    ([], [b"nothing is secret"], b"nothing is secret"),
    (["pässword".encode()], ["pä".encode()[:2], "ässword".encode()[1:]],
     b"******"),
    ([b"a.c", b"["], [b"abc a.c ["], b"abc ****** ******"),
])
def test_secret_split_into_pieces_is_masked(secrets, pieces, shown):
    assert masked(secrets, pieces) == shown


def cuts(text: bytes):
    """The text in one piece, and in all ways to make two or three of it."""
    yield [text]
    for first, last in itertools.combinations_with_replacement(
            range(1, len(text)), 2):
        yield [text[:first], text[first:last], text[last:]]


SECRETS = [bytes(letters) for size in (1, 2, 3, 4)
           for letters in itertools.product(b"ab", repeat=size)]
TEXTS = [bytes(letters) for size in range(1, 8)
         for letters in itertools.product(b"ab", repeat=size)]


def test_masking_of_split_short_texts_equals_masking_of_whole_ones():
    """Each secret of up to four letters in each text of up to seven, cut
    everywhere; one letter at a time as well."""
    for secret in SECRETS:
        for text in TEXTS:
            expected = model([secret], text)
            for pieces in [*cuts(text), [bytes([x]) for x in text]]:
                assert masked([secret], pieces) == expected, (secret, pieces)


@pytest.mark.parametrize("seed", range(4))
def test_masking_of_several_secrets_does_not_depend_on_the_pieces(seed):
    """Also when one is part of another, or looks like a mask."""
    dice = random.Random(seed)
    for _ in range(3000):
        secrets = [bytes(dice.choices(b"ab*", k=dice.randint(1, 5)))
                   for _ in range(dice.randint(1, 3))]
        text = bytes(dice.choices(b"ab*c", k=dice.randint(0, 20)))
        pieces, at = [], 0
        while at < len(text):
            size = dice.randint(1, 6)
            pieces.append(text[at:at + size])
            at += size
        assert masked(secrets, pieces) == model(secrets, text), \
            (secrets, pieces)


def test_secret_split_across_two_streams_is_not_joined():
    mask = koitab.SecretMasker([b"secret"])
    assert mask.feed(STDOUT, b"sec") == b""
    assert mask.feed(STDERR, b"ret") == b"ret"
    assert mask.feed(STDOUT, b"ret") == b"******"


# ==========================================================================
# How it ended
# ==========================================================================

@pytest.mark.parametrize("command, exit_status, number", [
    ("exit 0", 0, None), ("exit 1", 1, None), ("exit 255", 255, None),
    ("kill -9 $$", None, 9), ("kill -15 $$", None, 15),
    ("kill -HUP $$", None, 1), ("ulimit -c 0; kill -SEGV $$", None, 11)])
def test_wait_status_is_split_into_exit_status_and_signal(
        command, exit_status, number):
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", command], {})
    _, status = os.waitpid(pid, 0)
    assert koitab.exit_and_signal(status) == (exit_status, number)


def test_core_dump_bit_is_not_part_of_the_signal():
    assert koitab.exit_and_signal(0x8B) == (None, 11)


def test_missing_status_is_neither_exit_nor_signal():
    assert koitab.exit_and_signal(koitab.NO_STATUS) == (None, None)


@pytest.mark.parametrize("state, exit_status, bad", [
    ("done", 0, False), ("done", 1, True), ("done", None, True),
    ("interrupted", None, True), ("unstartable", None, True),
    ("missed", None, True), ("skipped", None, False),
    ("queued", None, False), ("running", None, False)])
def test_state_and_exit_status_decide_whether_a_run_failed(
        state, exit_status, bad):
    assert koitab.is_failure({"state": state, "exit": exit_status}) is bad


@pytest.mark.parametrize("position, expected, end", [
    (0, [(1, b"one"), (2, b"two"), (0, b"1,000 bytes left out here"),
         (1, b"three")], 1011),
    (2, [(1, b"e"), (2, b"two"), (0, b"1,000 bytes left out here"),
         (1, b"three")], 1011),
    (6, [(0, b"1,000 bytes left out here"), (1, b"three")], 1011),
    (1000, [(0, b"6 bytes left out here"), (1, b"three")], 1011),
    (1006, [(1, b"three")], 1011), (1010, [(1, b"e")], 1011),
    (1011, [], 1011), (2000, [], 2000)])
def test_frames_are_read_from_a_position_of_the_output(
        position, expected, end):
    frames = b"".join((
        koitab.frame(1, 5, b"one"), koitab.frame(2, 6, b"two"),
        koitab.lost_note(1000), koitab.frame(1, 7, b"three")))
    found, after = koitab.frames_since(frames, position)
    assert ([(stream, body) for stream, _, body
             in koitab.read_frames(found)], after) == (expected, end)
