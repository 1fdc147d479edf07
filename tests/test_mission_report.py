"""Report: what is reported of a run?"""

from __future__ import annotations

import random
import re
import time

import pytest

import support

mission = support.load("mission")

EURO = "\u20ac"


def at_once(_seconds, function, *arguments):
    """A `limit` that never strikes."""
    return function(*arguments)


def log_filter(redact=(), filters=(), limit=at_once, values=()):
    found = mission.LogFilter(redact, filters, limit)
    found.values.extend(values)
    return found


class Decoded:
    """What an OutputDecoder emits: lines for the log, and for filters."""

    def __init__(self, redact=()):
        self.shown, self.filtered = [], []
        self.decoder = mission.OutputDecoder(log_filter(redact),
                                             self.take_lines)

    def take_lines(self, text: str, whole) -> None:
        self.shown += text.split("\n")
        if whole is None:
            self.filtered += text.split("\n")
        elif whole:
            self.filtered.append(whole)

    def of(self, *chunks) -> Decoded:
        """Take chunks; None is a second of silence."""
        for chunk in chunks:
            if chunk is None:
                self.decoder.silence()
            else:
                self.decoder.take(chunk)
        self.decoder.end()
        return self


# --- from bytes to lines --------------------------------------------------


OUTPUTS = [     # bytes, the lines they are
    (b"", []), (b"a", ["a"]), (b"a\n", ["a"]), (b"\n", [""]),
    (b"a\n\nb\n", ["a", "", "b"]), (b"a\r\nb\r\n", ["a", "b"]),
    (b"a\r\n\r\nb", ["a", "", "b"]), (b"a\r", ["a"]), (b"a\n\r\nb", [
        "a", "", "b"]),
    (b"10%\r20%\r30%\ndone\n", ["10%", "20%", "30%", "done"]),
    (b"x\ry\r\nz", ["x", "y", "z"]),
    (b"tab\tstays\n", ["tab\tstays"]), (b"nul\0nul\n", [r"nul\x00nul"]),
    (b"\x1b[31mred\x1b[0m\n", [r"\x1b[31mred\x1b[0m"]),
    (b"bell\x07 bs\x08 vt\x0b ff\x0c\n", [r"bell\x07 bs\x08 vt\x0b ff\x0c"]),
    (b"\x7f\n", [r"\x7f"]), ("caf\u00e9\nb\n".encode(), ["caf\u00e9", "b"]),
    (f"{EURO}\n\n{EURO}{EURO}\nplain\n".encode(),
     [EURO, "", EURO * 2, "plain"]),
    ("\U0001f600\r\n\u4e2d\n".encode(), ["\U0001f600", "\u4e2d"]),
    ("c1 \x9b31m\x85\n".encode(), [r"c1 \x9b31m\x85"]),
    ("\u202egnp\u2066\u200f\n".encode(), [r"\u202egnp\u2066\u200f"]),
    ("\u2028x\u2029\n".encode(), [r"\u2028x\u2029"]),
    (b"\xef\xbb\xbfbom\n", [r"\ufeffbom"]),
    (b"\xff\xfe\n\xe2\x82\n", [r"\xff\xfe", r"\xe2\x82"]),
    (b"\xe2\x82", [r"\xe2\x82"]), (b"\xc0\xaf \xed\xa0\x80\n",
                                  [r"\xc0\xaf \xed\xa0\x80"]),
    (b"\x80\n\xf8\x88\x80\x80\x80", [r"\x80", r"\xf8\x88\x80\x80\x80"]),
    (b"a\nFinishTime x\n[0s        ] ERROR: x\n",
     ["a", "FinishTime x", "[0s        ] ERROR: x"]),
]
each_output = pytest.mark.parametrize(
    "data, lines", OUTPUTS, ids=lambda value: repr(value)[:30])


@each_output
def test_bytes_become_lines_that_are_safe_to_show(data, lines):
    output = Decoded().of(data)
    assert output.shown == output.filtered == lines


@each_output
def test_lines_do_not_depend_on_where_the_chunks_end(data, lines):
    for cut in range(len(data) + 1):
        assert Decoded().of(data[:cut], data[cut:]).shown == lines, cut
    bytewise = [data[at:at + 1] for at in range(len(data))]
    assert Decoded().of(*bytewise).shown == lines


@each_output
def test_filtered_lines_do_not_depend_on_pauses_in_the_output(data, lines):
    for cut in range(len(data) + 1):
        output = Decoded().of(data[:cut], None, data[cut:])
        # An empty line has nothing to filter if it was shown already.
        assert [line for line in output.filtered if line] == [
            line for line in lines if line], cut


def test_random_chunks_of_random_bytes_give_the_same_lines():
    dice = random.Random(3)
    pieces = [b"\r", b"\n", b"\r\n", b"a", b"\0", EURO.encode(), b"\xff",
              b"\x1b[1m", "\u202e".encode(), b" "]
    for _ in range(300):
        data = b"".join(dice.choice(pieces) for _ in range(40))
        cuts = sorted(dice.sample(range(len(data)), 6)) + [len(data)]
        chunks = [data[a:b] for a, b in zip([0] + cuts, cuts)]
        assert Decoded().of(*chunks).shown == Decoded().of(data).shown
        assert "".join(Decoded().of(data).shown).isprintable()


def test_prompt_is_shown_after_a_pause_and_filtered_when_complete():
    output = Decoded()
    output.decoder.take(b"Password: ")
    assert output.decoder.waiting and output.shown == []
    output.decoder.silence()
    assert output.shown == ["Password: "] and output.filtered == []
    assert not output.decoder.waiting
    output.of(b"wrong\nnext\n")
    assert output.shown == ["Password: ", "wrong", "next"]
    assert output.filtered == ["Password: wrong", "next"]


def test_a_prompt_that_grows_is_shown_piece_by_piece():
    output = Decoded().of(b"a", None, b"b", None, b"c", None, b"\n", b"d")
    assert output.shown == ["a", "b", "c", "", "d"]
    assert output.filtered == ["abc", "d"]


def test_incomplete_line_is_not_shown_when_redactions_are_set():
    output = Decoded(redact=["secret"])
    output.decoder.take(b"sec")
    output.decoder.silence()
    assert not output.decoder.waiting and output.shown == []
    assert output.of(b"ret\n").shown == ["secret"]    # complete


# --- lines that are too long ----------------------------------------------


GOES_ON = " <<line continues>>"


@pytest.fixture
def short_lines(monkeypatch):
    monkeypatch.setattr(mission, "LONGEST_LINE", 16)


def test_long_line_is_split_with_marks_and_nothing_is_lost(short_lines):
    output = Decoded().of(b"before\n", b"x" * 20, b"y" * 20, b"z\nafter\n")
    pieces = output.shown[1:-1]
    assert all(piece.endswith(GOES_ON) for piece in pieces[:-1])
    assert "".join(pieces).replace(GOES_ON, "") == "x" * 20 + "y" * 20 + "z"
    assert (output.shown[0], output.shown[-1]) == ("before", "after")
    assert output.filtered == [
        "before", mission.TOO_LONG.format("41"), "after"]


def test_a_long_line_is_withheld_when_it_cannot_be_redacted(short_lines):
    output = Decoded(redact=["secret"]).of(b"x" * 15, b"secret", b"y" * 20,
                                      b"\nafter\n")
    assert output.shown == [mission.TOO_LONG.format("41"), "after"]


@pytest.mark.parametrize("chunks, lines", [
    # A prompt was shown; then its line grew too long.
    ((b"prompt", None, b"x" * 20, b"\nnext line\nlast line\n"),
     ["next line", "last line"]),
    ((b"prompt", None, b"x" * 20, None, b"\r", b"next line\nlast line\n"),
     ["next line", "last line"]),
    ((b"x" * 40, None, b"\nnext line\n", b"last line\n"),
     ["next line", "last line"]),
    ((b"x" * 16, b"\nnext line\n", b"last line\n"),
     ["next line", "last line"]),
    ((b"x" * 17, b"\r\nnext line\n", b"last line"),
     ["next line", "last line"]),
])
def test_lines_after_a_long_line_are_complete(chunks, lines, short_lines):
    output = Decoded().of(*chunks)
    assert output.shown[-2:] == lines
    assert output.filtered[-2:] == lines


def test_text_shown_as_a_prompt_is_not_shown_again(short_lines):
    output = Decoded().of(b"prompt", None, b"x" * 30, b"\n")
    shown = "".join(output.shown).replace(GOES_ON, "")
    assert shown == "prompt" + "x" * 30


@pytest.mark.parametrize("redact", [(), ("secret",)])
def test_a_long_line_without_an_end_is_not_lost(redact, short_lines):
    output = Decoded(redact).of(b"x" * 16, b"x" * 16)
    assert output.shown[-1] == mission.TOO_LONG.format("32") if redact else \
        "".join(output.shown).replace(GOES_ON, "") == "x" * 32
    assert output.filtered == [mission.TOO_LONG.format("32")]


def test_an_endless_line_takes_little_memory_in_the_decoder():
    output = Decoded()
    output.take_lines = lambda text, whole: None
    output.decoder.emit = output.take_lines
    for _ in range(200):
        output.decoder.take(b"x" * 65536)
        assert len(output.decoder.pending) <= mission.LONGEST_LINE + 65536


# --- redactions and filters -----------------------------------------------


PATTERNS = [
    "^secret", "secret$", "^secret$", "^$", "^", "$", "a^b", "a$b",
    r"\bkey\b", r"\Bkey", r"\Asecret", r"secret\Z", r"secret\z",
    "(?<=token=)x+", "(?<!no)secret", "secret(?!s)", "(?=secret)",
    "(?i)SECRET", "(?m)^secret$", "(?s)a.b", "a.b", "[^a]b", r"a\sb",
    r"a[\s\S]b", r"\s+$", r"^\s", "(secret|key)+", "s.*t", "^.*$", "x*",
    "(?P<n>a)(?P=n)", r"(a)\1", "[[:space:]]b", "", "(?x) secret # odd",
    r"secret(?!\s)", r"(?<!\s)b", r"(?<!\W)a(?!\W)",
    r"\W", r"^\S+$", "[\n]", r"\n", "a|^b", "(^|,)b", "(a|b$)", r"\d+\s*$",
]
LINES = ["", "secret", "a secret", "secret a", "secrets", "nosecret", "a",
         "b", "ab", "a b", "aa", "a\tb", "key", "a key b", "monkey", "SECRET",
         "token=xxx", "1,b", "12 ", " ", "caf\u00e9", "x" * 50, "a,b"]


@pytest.mark.parametrize("text", PATTERNS)
def test_filters_apply_to_each_line_of_a_chunk(text):
    alone = re.compile(mission.pattern(text).pattern, mission.pattern(
        text).flags)
    dice = random.Random(text)
    for _ in range(60):
        lines = dice.sample(LINES, dice.randrange(1, 6))
        chunk = "\n".join(lines)
        wanted = [not alone.search(line) for line in lines]
        found = log_filter(filters=[text]).keep_lines(chunk)
        assert found == ([] if all(wanted) else wanted), lines
        assert log_filter(redact=[text]).redacted(chunk) == "\n".join(
            alone.sub("***", line) for line in lines), lines


@pytest.mark.parametrize("redact, values, text, found", [
    (["p=[^ ]+"], [], "p=x y\nz p=q", "*** y\nz ***"),
    (["a", "b"], [], "abc", "******c"), ([], ["hunter2"],
                                        "x hunter2\nhunter2", "x ***\n***"),
    ([], ["long secret", "long"], "long secret long", "*** ***"),
    (["(?<=token=).*"], [], "token=1\ntoken=2", "token=***\ntoken=***"),
    ([r"(\w+)@"], [], r"a@b \1", r"***b \1"),
    ([], ["a.b"], "a.b axb", "*** axb"),
])
def test_a_redacted_match_becomes_three_stars(redact, values, text, found):
    one = log_filter(redact, values=values)
    assert one.redacts and one.redacted(text) == found


def test_filter_without_patterns_redacts_and_drops_nothing():
    one = log_filter()
    assert not one.redacts
    assert one.redacted("a\nb") == "a\nb" and one.keep_lines("a\nb") == []


@pytest.mark.parametrize("filters, text, results", [
    (["^a$"], "b\nc", []), (["^a$"], "a\nb", [False, True]),
    (["a", "b"], "a\nb\nc", [False, False, True]),
    (["^$"], "\nx\n", [False, True, False]), (["zz1$"], "x zz1", [False]),
])
def test_filters_match_the_line_without_its_prefix(filters, text, results):
    assert log_filter(filters=filters).keep_lines(text) == results


def test_a_filter_of_the_original_may_begin_with_the_columns_space():
    """The original matched `[12ms      ] text`: its sample's filters begin
    with that space."""
    one = log_filter(filters=[" sending incremental", " $"])
    assert one.keep_lines("sending incremental file list\nxsending incremental"
                      "\nnow sending incremental") == [False, True, False]


class Slow:
    """A `limit` that is too slow for what holds a word: for one line, or
    for `chunk`, all the lines at once."""

    def __init__(self, word: str, chunk: str):
        self.word, self.chunk, self.calls = word, chunk, 0

    def __call__(self, seconds, function, *arguments):
        assert 0 < seconds <= mission.LINE_SECONDS
        self.calls += 1
        if self.word in (arguments[0] if arguments else self.chunk):
            raise mission.TooSlow
        return function(*arguments)


def test_a_line_that_takes_too_long_to_match_is_withheld():
    text = "ok\naaa!\nfine"
    limit = Slow("aaa", text)
    one = log_filter(redact=["(a+)+$"], limit=limit)
    assert one.redacted(text).split("\n") == [
        "ok", mission.SLOW.format("redact"), "fine"]
    one = log_filter(filters=["(a+)+$"], limit=limit)
    assert one.keep_lines(text) == [True, None, True]


def test_a_line_dropped_by_one_filter_is_dropped_though_another_is_slow():
    one = log_filter(filters=["(a+)+$", "!"])
    one.apply = lambda rule, lines, judge, withheld: [
        withheld if rule is one.filters[0] else judge(lines[0])]
    assert one.keep_lines("aaa!") == [False]


def test_time_of_a_pattern_in_one_run_is_limited():
    """Ten seconds for all its slow lines; then they are withheld unread."""
    limit = Slow("a", "a")
    one = log_filter(redact=["(a+)+$"], limit=limit)
    for _ in range(30):
        assert one.redacted("a") == mission.SLOW.format("redact")
    calls = limit.calls
    assert one.redacted("a") == mission.SLOW.format("redact")
    assert limit.calls == calls
    assert calls * mission.LINE_SECONDS <= 2.5 * mission.ALL_SECONDS


def test_a_slow_redaction_withholds_nothing_when_nothing_is_slow():
    limit = Slow("aaa", "quick")
    assert log_filter(redact=["q"], limit=limit).redacted("quick") == "***uick"


def test_block_without_a_match_is_searched_once_per_pattern():
    limit = Slow("aaa", "quick")
    one = log_filter(redact=["password="], filters=["^skip", "same$"],
                     limit=limit)
    text = "\n".join(["sent photos"] * 100)
    assert one.redacted(text) == text and one.keep_lines(text) == []
    assert limit.calls == 3


def test_a_block_that_takes_too_long_is_matched_line_by_line():
    limit = Slow("\n", "quick")
    one = log_filter(redact=["b+"], limit=limit)
    assert one.redacted("abc\nabb") == "a***c\na***"


def test_a_real_runaway_pattern_is_stopped():
    processes = mission.Processes(mission.Clock())
    import signal
    before = signal.signal(signal.SIGALRM, processes.time_is_up)
    try:
        began = time.monotonic()
        with pytest.raises(mission.TooSlow):
            processes.limit(0.05, re.compile("(a+)+$").search, "a" * 40 + "!")
        assert time.monotonic() - began < 5
        assert processes.limit(5, re.compile("b").search, "ab")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- an excerpt of a long log ---------------------------------------------


def excerpt(texts, limit: int):
    one = mission.Excerpt(limit)
    for text in texts:
        one.add(text)
    return one


def test_a_short_text_is_kept_whole():
    texts = [f"line {number}\n" for number in range(10)]
    assert excerpt(texts, 1000).text() == "".join(texts)


@pytest.mark.parametrize("limit", [10, 50, 100, 1000])
@pytest.mark.parametrize("sizes", [
    [5] * 1000, [1] * 300, [49, 51] * 50, [100_000], [3, 100_000, 3],
    [100_000, 3], [700] * 20, [25, 25, 25, 25],
])
def test_long_text_keeps_its_head_and_tail_and_counts_the_middle(sizes, limit):
    texts = [f"{number % 10}" * (size - 1) + "\n"
             for number, size in enumerate(sizes)]
    whole = "".join(texts)
    one = excerpt(texts, limit)
    head, tail = "".join(one.head), "".join(one.tail)
    assert whole.startswith(head) and whole.endswith(tail)
    assert len(head) + len(tail) <= limit
    assert len(head) + one.lost_size + len(tail) == len(whole)
    assert one.lost_lines == whole[len(head):len(whole) - len(tail)].count(
        "\n")
    assert one.lost_size == 0 or one.text() == (
        f"{head}\n<<{mission.plural(one.lost_lines, 'line')} left out here: "
        f"{one.lost_size:,} characters>>\n\n{tail}")
    if len(whole) <= limit // 2:
        assert one.text() == whole


def test_text_added_in_one_piece_is_cut_at_line_ends():
    whole = "".join(f"line {number}\n" for number in range(1000))
    one = excerpt([whole], 200)
    assert "".join(one.head).endswith("\n")
    assert "".join(one.tail).startswith("line ")
    assert len(one.text()) < 300


@pytest.mark.parametrize("limit", [5, 20, 100, 10_000])
def test_end_of_the_log_for_a_ping_has_whole_lines_within_the_limit(limit):
    whole = "".join(f"line {number}\n" for number in range(100))
    found = excerpt([whole], 10_000).end(limit)
    assert len(found) <= limit and whole.endswith(found)
    assert found == whole or limit < 8 or found.startswith("line ")


def test_excerpt_of_a_million_lines_takes_little_memory_and_time():
    one, began = mission.Excerpt(2000), time.process_time()
    for number in range(200_000):
        one.add(f"{number}\n")
    assert time.process_time() - began < 5
    assert len(one.text()) < 2200


# --- the log in the mail --------------------------------------------------


def test_number_of_filtered_lines_is_shown_in_their_place():
    mail_log = mission.MailLog(log_filter(filters=["^drop"]))
    mail_log.own("# Start\n")
    mail_log.output("a\ndrop 1\ndrop 2\nb", "[1s] ")
    mail_log.output("drop 3", "[2s] ")
    mail_log.own("[3s] TaskFinish\n")
    mail_log.output("drop 4", "[4s] ")
    mail_log.close()
    assert mail_log.excerpt.text() == (
        "# Start\n[1s] a\n\n<<2 lines filtered>>\n\n[1s] b\n"
        "\n<<1 line filtered>>\n\n[3s] TaskFinish\n"
        "\n<<1 line filtered>>\n\n")


def test_lines_of_mission_are_never_filtered():
    mail_log = mission.MailLog(log_filter(filters=["."]))
    mail_log.own("- mail: exit status 1\n")
    assert mail_log.excerpt.text() == "- mail: exit status 1\n"


def test_a_line_too_slow_for_a_filter_is_withheld_from_the_mail():
    mail_log = mission.MailLog(log_filter(filters=["x"]))
    mail_log.log_filter.keep_lines = lambda text: [True, None]
    mail_log.output("a\nb", "> ")
    withheld = mission.SLOW.format("a filter")
    assert mail_log.excerpt.text() == f"> a\n> {withheld}\n"


def test_log_in_a_mail_is_cut_to_the_limit():
    mail_log = mission.MailLog(log_filter())
    for number in range(60_000):
        mail_log.output(f"line {number}", "[1s        ] ")
    text = mail_log.excerpt.text()
    assert len(text) <= mission.MAIL_LIMIT + 200
    assert "line 0\n" in text and "line 59999\n" in text
    assert re.search(r"<<[\d,]+ lines left out here: [\d,]+ char", text)


def test_every_line_of_a_text_gets_the_prefix():
    assert mission.prefixed("a\n\nb", "> ") == "> a\n> \n> b\n"


# --- the log's look -------------------------------------------------------


def test_log_header_equals_that_of_the_original():
    rule = "# " + "\u2014" * 47
    assert mission.header("Task: Mail") == \
        f"{rule}\n# Task: Mail\n{rule}\n\n"


def test_title_cannot_forge_a_log_header():
    assert mission.header("a\n# Finish").count("\n") == 4


@pytest.mark.parametrize("elapsed, column", [
    (0, "[0s        ] "), (0.012, "[12ms      ] "), (1.234, "[1.234s    ] "),
    (3605.1, "[1h0m5.1s  ] "), (360000.123, "[100h0m0.123s] "),
])
def test_elapsed_column_is_twelve_characters_or_wider(elapsed, column):
    assert mission.elapsed_column(elapsed) == column


@pytest.mark.parametrize("code, text", [
    (0, "exit status 0"), (3, "exit status 3"),
    (-9, "killed by signal 9 (SIGKILL)"),
    (-15, "killed by signal 15 (SIGTERM)"), (-99, "killed by signal 99"),
])
def test_end_of_a_process_is_described_in_words(code, text):
    assert mission.status_text(code) == text


# --- results -------------------------------------------------------------


def problem(result: str, level: str = "error", source: str = "x",
            text: str = "y"):
    return mission.RunProblem(result, level, source, text)


E, W = problem("tasks"), problem("tasks", "warning")
H, D = problem("housekeeping", "warning"), problem("delivery", "error",
                                                   "ping", "HTTP 500")


@pytest.mark.parametrize("problems, stopped, result, status, words", [
    ([], 0, "ok", 0, ""),
    ([E], 0, "failed", 1, "1 error was emitted during the run"),
    ([E, E, W], 0, "failed", 1,
     "2 errors and 1 warning were emitted during the run"),
    ([W], 0, "failed", 1, "1 warning was emitted during the run"),
    ([H, H], 0, "failed", 1, "2 warnings were emitted during the run"),
    ([D], 0, "undelivered", 74, "all tasks succeeded, but ping: HTTP 500"),
    ([D, D], 0, "undelivered", 74,
     "all tasks succeeded, but ping: HTTP 500; ping: HTTP 500"),
    ([E, D], 0, "failed", 1, "1 error was emitted during the run"),
    ([D, W], 0, "failed", 1, "1 warning was emitted during the run"),
    ([], 15, "stopped", 143, "the run was stopped by SIGTERM"),
    ([E, D], 2, "stopped", 130, "the run was stopped by SIGINT"),
    ([D], 1, "stopped", 129, "the run was stopped by SIGHUP"),
])
def test_problems_determine_result_exit_status_and_message(
        problems, stopped, result, status, words):
    assert mission.result_of(problems, stopped) == result
    assert mission.exit_status(problems, stopped) == status
    assert mission.closing_words(problems, stopped) == words


@pytest.mark.parametrize("seconds, text", [
    (0.0123, "12ms"), (0.9996, "999ms"), (1.2, "1s"), (62.4, "1m2s"),
    (3599.7, "1h0m0s"), (3600, "1h0m0s"),
])
def test_run_duration_has_whole_seconds_from_one_second_on(seconds, text):
    assert mission.run_took(seconds) == text


# --- mail's subject -------------------------------------------------------


@pytest.mark.parametrize("host, text, mark, line", [
    ("box", "run finished in 1m2s", "FAILURE",
     "box: [FAILURE] run finished in 1m2s"),
    ("box", "run started", "", "box: run started"),
    ("b\nBcc: x@y", "t", "", r"b\x0aBcc: x@y: t"),
    ("b", "a\r\nX-Evil: 1\r\n\r\nbody", "",
     r"b: a\x0d\x0aX-Evil: 1\x0d\x0a\x0d\x0abody"),
    ("=?utf-8?q?a=0aBcc:_x?=", "t", "", "= ?utf-8?q?a=0aBcc:_x?=: t"),
    ("b", "=?=?x", "", "b: = ?= ?x"),
    ("b", "a\tb  c\u00a0d", "", "b: a b c d"),
    ("b", "\u2028\u202e\0", "", r"b: \u2028\u202e\x00"),
])
def test_subject_is_one_line_without_control_characters(
        host, text, mark, line):
    assert mission.subject(host, text, mark) == line


def test_length_of_a_subject_is_limited():
    assert len(mission.subject("h" * 1000, "t" * 1000, "FAILURE")) <= 200


@pytest.mark.parametrize("evil", [
    "x\nBcc: victim@example.com", "x\r\n\r\nbody", "=?utf-8?b?CkJjYzogeA==?=",
    "=?utf-8?q?=0d=0aBcc:_x?=", "=\u200b?utf-8?q?=0aBcc:_x?=", "x\x0bBcc: x",
    "x\x85Bcc: x", "x\u2028Bcc: x", "x\0y", "=\t?utf-8?q?=0aBcc:_x?=",
])
def test_value_cannot_add_a_mail_header(evil):
    import email
    import email.policy
    message = mission.rfc5322(
        "box", ["anon@example.com"],
        mission.subject(evil, evil, "FAILURE"),
        f"{evil}\n", "id.start", 0.0)
    head = message.split(b"\n\n", 1)[0].lower()
    assert b"\nbcc" not in head and message.count(b"\nSubject:") == 1
    read = email.message_from_bytes(message, policy=email.policy.default)
    assert set(read.keys()) == {
        "From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted",
        "Content-Type", "Content-Transfer-Encoding", "MIME-Version"}
    assert read["To"] == "anon@example.com"
    assert "\n" not in read["Subject"]


# --- spark lines and metrics ----------------------------------------------


@pytest.mark.parametrize("values, bars", [
    ([], ""), ([0], "\u2581"), ([0, 0], "\u2581\u2581"), ([5], "\u2588"),
    ([1, 2, 4, 8], "\u2582\u2583\u2585\u2588"),
    (list(range(9)), "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
     "\u2588"),
    ([1, 1_000_000], "\u2581\u2588"),
])
def test_sparkline_has_one_bar_per_value(values, bars):
    assert mission.sparkline(values) == bars


RECORD = {"result": "failed", "started": 1774747800.5, "seconds": 62.1234,
          "errors": 2, "warnings": 1, "tasks": [
              {"slug": "mail", "outcome": "ok", "seconds": 1.5},
              {"slug": "x-y_z", "outcome": "skipped", "seconds": 0.0}]}


OF_CONFIG = r'config="/etc/m \"x\".json"'


def test_metrics_are_prometheus_text():
    text = mission.metrics_text(RECORD, 5.5, '/etc/m "x".json')
    assert text.endswith("\n") and "\n\n" not in text
    sample = re.compile(
        "mission_[a-z_]+" + re.escape("{" + OF_CONFIG)
        + r'(,task="[a-z0-9_-]+")?\} -?\d+(\.\d+)?(e\+\d+)?')
    helped, typed = set(), set()
    for line in text.splitlines():
        words = line.split(" ", 3)
        if words[:2] == ["#", "HELP"]:
            assert words[3]
            helped.add(words[2])
        elif words[:2] == ["#", "TYPE"]:
            assert words[3] == "gauge"
            typed.add(words[2])
        else:
            assert sample.fullmatch(line), line
            assert re.split("[{ ]", line)[0] in helped & typed
    assert helped == typed
    for name, value in (
            ("run_success", "0"), ("run_errors", "2"), ("run_warnings", "1"),
            ("run_duration_seconds", "62.123"), ("last_success_seconds", "5"),
            ("run_start_seconds", "1774747800")):
        assert f"mission_{name}{{{OF_CONFIG}}} {value}" in text.splitlines()
    for name, task, value in (
            ("success", "mail", "1"), ("success", "x-y_z", "0"),
            ("duration_seconds", "mail", "1.5")):
        assert f'mission_task_{name}{{{OF_CONFIG},task="{task}"}} {value}' \
            in text.splitlines()


@pytest.mark.parametrize("result, success", [
    ("ok", 1), ("undelivered", 1), ("failed", 0), ("stopped", 0), ("lost", 0),
])
def test_an_undelivered_mail_does_not_change_the_success_metric(
        result, success):
    text = mission.metrics_text({**RECORD, "result": result}, 0, "/m")
    assert f'mission_run_success{{config="/m"}} {success}\n' in text


def test_both_lists_of_unsafe_characters_are_equal():
    """`visible` escapes by a pattern, the OutputDecoder by a table."""
    unsafe = re.compile(mission.UNSAFE)
    by_pattern = {code for code in range(0x110000)
                  if unsafe.match(chr(code))}
    assert by_pattern - set(range(0xD800, 0xE000)) - {10} \
        == set(mission.ESCAPES)
    assert all(mission.ESCAPES[code] == mission.escape_controls(chr(code))
               for code in mission.ESCAPES)
