"""Schedule, and the minutes of section Time: when does an entry run next?"""

from __future__ import annotations

import datetime
import itertools
import random
import time
import types
import zoneinfo
from pathlib import Path

import pytest

import support

koitab = support.load("koitab")
CASES = Path(__file__).parent / "cases"
MINUTE, HOUR, DAY = 60, 3600, 86400


def zone(name: str):
    """A time zone, read once."""
    if name not in ZONES:
        ZONES[name] = koitab.Machine().zone(name)
    return ZONES[name]


ZONES: dict = {"UTC": koitab.UTC}


def at(text: str, offset: str = "+00:00") -> int:
    """The instant of 2026-03-01 00:00, in UTC if it has no offset."""
    text = text.replace("Z", "+00:00")
    if len(text) < 20:
        text += offset
    return int(datetime.datetime.fromisoformat(text).timestamp())


def vectors(name: str) -> list[list[str]]:
    lines = (CASES / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def before(starts, end: float) -> list[int]:
    return list(itertools.takewhile(lambda start: start < end, starts))


def parse(text: str):
    return koitab.Schedule.parse(text)


# --- what Debian's cron does ----------------------------------------------


@pytest.mark.parametrize("spec, place, reference, starts",
                         vectors("fires.tsv"))
def test_starts_equal_the_vectors_of_the_case_files(
        spec, place, reference, starts):
    schedule, here, after = parse(spec), zone(place), at(reference)
    if starts == "never":       # within the three years that were searched
        assert (schedule.next(after, here) or koitab.FOREVER) \
            > after + 3 * 365 * DAY
        return
    wanted = [at(start) for start in starts.split(",")]
    found = schedule.iter_starts(after, here)
    assert list(itertools.islice(found, len(wanted))) == wanted
    assert schedule.next(after, here) == wanted[0]


@pytest.mark.parametrize("spec, place, reference, starts",
                         vectors("starts.tsv"))
def test_starts_equal_those_of_debians_cron(spec, place, reference,
                                                  starts):
    schedule, here, after = parse(spec), zone(place), at(reference)
    virtual = None
    if reference == "2025-10-26T02:10+01:00":       # the daemon starts there
        virtual = after + here.offset(after)
    if starts == "never":
        assert schedule.next(after, here) is None
        assert list(schedule.iter_starts(after, here)) == []
        return
    wanted = starts.split(",")
    found = list(itertools.islice(schedule.iter_starts(after, here, virtual),
                                  len(wanted)))
    assert [koitab.format_rfc3339(start, here.offset(start))
            for start in found] == [
        f"{start[:16]}:00{start[16:]}" for start in wanted]


def test_case_files_have_all_vectors():
    assert len(vectors("fires.tsv")) == 400
    assert len(vectors("starts.tsv")) == 107


# --- the same, from a model that goes minute by minute --------------------


def offsets(name: str, first: int, last: int) -> list[int]:
    """The offset in minutes of each minute, as `zoneinfo` has it."""
    with open(support.ZONES / name, "rb") as file:
        here, found = zoneinfo.ZoneInfo.from_file(file), []
    for quarter in range(first // 15, last // 15 + 1):
        moment = datetime.datetime.fromtimestamp(quarter * 900, here)
        found += [int(moment.utcoffset().total_seconds()) // 60] * 15
    return found[first % 15:]


def cron(minutes):
    """Yield what Debian's loop does: (turn, local minute, whether it checks
    wildcard jobs, and fixed jobs). `minutes` is local time at each turn."""
    minutes = iter(enumerate(minutes))
    virtual = running = next(minutes)[1]
    for turn, minute in minutes:
        if minute == running:
            continue
        running, ahead = minute, minute - virtual
        if ahead == 1:
            virtual = minute
            yield turn, minute, True, True
        elif 2 <= ahead <= 5:
            while virtual < minute:
                virtual += 1
                yield turn, virtual, True, True
        elif 6 <= ahead <= 180:
            yield turn, minute, True, False
            while virtual < minute:
                virtual += 1
                yield turn, virtual, False, True
        elif -180 < ahead <= 0:
            yield turn, minute, True, False
        else:
            virtual = minute
            yield turn, minute, True, True


class ModelSchedule:
    """Five fields as sets of numbers, parsed without any checks."""

    RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))

    def __init__(self, text: str):
        parts = text.split()
        minutes, hours, self.days, self.months, self.weekdays = (
            self.numbers(part, *span) for part, span in zip(
                parts, self.RANGES))
        self.times = {h * 60 + m for h in hours for m in minutes}
        self.wildcard = parts[0][0] == "*" or parts[1][0] == "*"
        self.both = parts[2][0] == "*" or parts[4][0] == "*"
        self.seen: dict[int, bool] = {}

    @staticmethod
    def numbers(text: str, low: int, high: int) -> set[int]:
        found = set()
        for part in text.split(","):
            span, _, step = part.partition("/")
            first, _, last = span.partition("-")
            if span == "*":
                first, last = low, high
            found |= set(range(int(first), int(last or first) + 1,
                               int(step or 1)))
        return found

    def on(self, day: int) -> bool:
        if day not in self.seen:
            date = datetime.date(1970, 1, 1) + datetime.timedelta(day)
            dated = date.day in self.days
            weekly = bool({date.isoweekday(), date.isoweekday() % 7}
                          & self.weekdays)
            self.seen[day] = date.month in self.months and (
                dated and weekly if self.both else dated or weekly)
        return self.seen[day]

    def picks(self, events):
        """The events that start it."""
        times, on = self.times, self.on
        return [event for event in events if event[1] % 1440 in times
                and event[2 if self.wildcard else 3] and on(event[1] // 1440)]


EXPRESSIONS = [
    "* * * * *", "*/7 * * * *", "30 * * * *", "*/20 2 * * *",
    "0-59/20 2 * * *",
    "30 2 * * *", "0 2 * * *", "0,30 1-3 * * *", "15 */2 * * *",
    "59 23 * * *", "0 0 * * *", "5 0 13 * 5", "5 0 */2 * 0", "10 3 1 * */2",
    "45 1 29 2 *", "0 12 31 * 1-3", "1 2 1-7 4,10 1", "33 */5 * 3,10,11 0",
]


MODELLED = [
    ("Europe/Berlin", "2025-01-10 00:00"),
    ("America/New_York", "2024-02-11 07:33"),
    ("Australia/Lord_Howe", "2025-02-01 00:00"),
    ("Antarctica/Troll", "2025-03-01 00:00"),
    ("Asia/Beirut", "2025-01-01 00:00"),
    ("Pacific/Apia", "2011-08-01 00:00"),
]


@pytest.mark.parametrize("place, begin", MODELLED)
def test_starts_equal_those_of_a_model_that_checks_each_minute(place, begin):
    first = at(begin) // MINUTE
    last = first + 410 * 1440
    events = list(cron(first + turn + offset for turn, offset in enumerate(
        offsets(place, first, last))))
    here, dice = zone(place), random.Random(place)
    compared, turn = 0, MODELLED.index((place, begin)) % 3
    # By default each expression in two of the zones.
    for text in EXPRESSIONS if support.FULL else EXPRESSIONS[turn::3]:
        wanted = [(first + event[0]) * MINUTE
                  for event in ModelSchedule(text).picks(events)]
        schedule = parse(text)
        wanted = before(wanted, (last - 15) * MINUTE)
        found = before(schedule.iter_starts(first * MINUTE, here),
                       (last - 15) * MINUTE)
        assert found == wanted, text
        compared += len(found)
        pairs = list(zip(wanted, wanted[1:]))
        for start, later in dice.sample(pairs, min(len(pairs), 100)):
            if later > start:
                assert schedule.next(start, here) == later
                assert schedule.next(later - 1, here) == later
                assert schedule.next(start + dice.randrange(
                    later - start) // MINUTE * MINUTE, here) == later
    assert compared > (600_000 if support.FULL else 10_000)


def test_random_expressions_agree_with_the_model():
    dice = random.Random(20260329)
    first = at("2026-03-20 00:00") // MINUTE
    last = first + 20 * 1440
    events = list(cron(first + turn + offset for turn, offset in enumerate(
        offsets("Europe/Berlin", first, last))))
    for _ in range(150 if support.FULL else 40):
        text = random_expression(dice)
        wanted = [(first + event[0]) * MINUTE
                  for event in ModelSchedule(text).picks(events)]
        end = (last - 15) * MINUTE
        found = parse(text).iter_starts(first * MINUTE, zone("Europe/Berlin"))
        assert before(found, end) == before(wanted, end), text


def random_expression(dice) -> str:
    def column(low: int, high: int) -> str:
        kind = dice.randrange(6)
        a, b = sorted(dice.choices(range(low, high + 1), k=2))
        return ["*", f"*/{dice.randint(1, high)}", str(a), f"{a}-{b}",
                f"{a}-{b}/{dice.randint(1, 9)}",
                f"{a},{b},{dice.randint(low, high)}"][kind]
    return " ".join(column(*span) for span in ModelSchedule.RANGES)


# --- reading --------------------------------------------------------------


def numbers(bits: int) -> list[int]:
    return [n for n in range(64) if bits >> n & 1]


@pytest.mark.parametrize("field, text, values", [
    (0, "5-59/10", [5, 15, 25, 35, 45, 55]),
    (0, "1-5,10-20/5,30", [1, 2, 3, 4, 5, 10, 15, 20, 30]),
    (0, "007", [7]), (0, "*/60", [0]), (0, "0-59/60", [0]),
    (0, "*/1000000005", [0]), (0, "*/" + "0" * 30 + "30", [0, 30]),
    (0, "*/100", [0]),
    (0, "*/7", list(range(0, 60, 7))), (0, "5-1", []), (1, "23-23", [23]),
    (0, "5-0", []), (1, "5-0", []),
    (0, "5,5,5", [5]), (0, "59-59/1", [59]), (1, "*/5", [0, 5, 10, 15, 20]),
    (2, "*/2", list(range(1, 32, 2))), (3, "jan-dec/2", [1, 3, 5, 7, 9, 11]),
    (3, "*/5", [1, 6, 11]), (3, "jan-3", [1, 2, 3]), (3, "DEC,jAn", [1, 12]),
    (3, "feb-jan", []), (4, "mon-fri/2", [1, 3, 5]), (4, "mon-5", [1, 2, 3,
                                                                    4, 5]),
    (4, "fri-sun", [5, 6, 7]), (4, "5-0", [5, 6, 7]), (4, "sat-sun", [6, 7]),
    (4, "fri-mon", []), (4, "0-7", list(range(8))), (4, "*/7", [0, 7]),
    (0, "3~3,5", [3, 5]),
])
def test_field_is_parsed_into_a_set_of_values(field, text, values):
    assert numbers(koitab.SCHEDULE_FIELDS[field].parse(text)) == values


@pytest.mark.parametrize("spec, wildcard, both", [
    ("*/5 2 * * *", True, True), ("30 */2 * * *", True, True),
    ("0-59/5 2 * * *", False, True), ("5,* 2 * * *", False, True),
    ("@hourly", True, True), ("@daily", False, True),
    ("0 0 1 * mon", False, False), ("0 0 *,5 * mon", False, True),
    ("0 0 5,* * mon", False, False), ("0 0 1 * */2", False, True),
    ("0 0 1-31 * 0-7", False, False),
])
def test_only_a_star_at_the_beginning_of_a_field_counts(spec, wildcard, both):
    schedule = parse(spec)
    assert (schedule.wildcard, schedule.both) == (wildcard, both)


def test_weekdays_0_and_7_are_sunday():
    sundays = {parse(f"0 0 * * {day}").weekdays
               for day in ("0", "7", "sun", "SUN", "07", "0,7")}
    assert sundays == {1}


def test_names_cover_twelve_months_and_seven_weekdays():
    assert list(koitab.MONTHS.values()) == list(range(1, 13))
    assert list(koitab.WEEKDAYS.values()) == list(range(7))
    assert [calendar_name.lower()[:3] for calendar_name in
            koitab.MONTH_WORDS] == list(koitab.MONTHS)
    assert [calendar_name.lower()[:3] for calendar_name in
            koitab.WEEKDAY_WORDS] == list(koitab.WEEKDAYS)


@pytest.mark.parametrize("text", [
    "", "*", "* * * *", "* * * * * *", "@reboot", "@manual", "@Daily",
    "4294967301 * * * *", "1" * 5000 + " * * * *", "1-2-3 * * * *",
    "*/1/1 * * * *", "9~1 * * * *", "1~2/2 * * * *",
    "1~2~3 * * * *", "* * * * jan", "1. * * * *", "１ * * * *",
])
def test_invalid_schedule_raises_schedule_error(text):
    with pytest.raises(koitab.ScheduleError):
        parse(text)


def test_random_minute_is_stable_and_within_its_range():
    seen = {parse(f"10~20 {hour} * * *").minutes for hour in range(24)}
    assert seen == {parse("10~20 5 * * *").minutes}
    picked = {numbers(koitab.Schedule.parse(
        "10~20 * * * *", pick=lambda text, n=n: n).minutes)[0]
        for n in range(100)}
    assert picked == set(range(10, 21))
    assert numbers(koitab.Schedule.parse(
        "0 ~ * * *".replace("~", "~5"), pick=lambda text: 5).hours) == [5]
    assert numbers(koitab.Schedule.parse(
        "0 20~ * * *", pick=lambda text: 3).hours) == [23]
    assert numbers(koitab.Schedule.parse(
        "0 ~ * * *", pick=lambda text: 23).hours) == [23]


# --- next -----------------------------------------------------------------


@pytest.mark.parametrize("text, after, expected", [
    ("*/15 * * * *",  "2026-03-01 00:00", "2026-03-01 00:15"),
    ("0 9 1 * mon",   "2026-03-02 09:00", "2026-03-09 09:00"),  # either
    ("0 9 */2 * mon", "2026-03-02 09:00", "2026-03-09 09:00"),  # both
    ("0 0 1 oct *",   "2026-03-01 00:00", "2026-10-01 00:00"),
    ("0 0 31 2 *",    "2026-03-01 00:00", None),                # never
    ("0 0 29 2 */7",  "2026-03-01 00:00", "2032-02-29 00:00"),
    ("0 0 29 2 */7",  "2096-03-01 00:00", "2128-02-29 00:00"),
    ("0 0 29 2 *",    "1999-03-01 00:00", "2000-02-29 00:00"),
    ("0 0 * * *",     "1969-12-30 00:00", "1969-12-31 00:00"),
    ("0 0 * * *",     "9998-12-31 12:00", "9999-01-01 00:00"),
    ("5-1 * * * *",   "2026-03-01 00:00", None),
    ("* 5-1 * * *",   "2026-03-01 00:00", None),
    ("0 0 1 * 5-1",   "2026-03-01 00:00", "2026-04-01 00:00"),
    ("0 0 * * 5-1",   "2026-03-01 00:00", None),
    ("0 0 * 5-1 *",   "2026-03-01 00:00", None),
    ("0 0 31 4,6,9,11 1", "2026-03-31 00:00", "2026-04-06 00:00"),
])
def test_next_returns_the_first_later_start(text, after, expected):
    found = parse(text).next(at(after))
    assert found == (expected and at(expected))


@pytest.mark.parametrize("second", [0, 1, 30, 59])
def test_next_skips_the_minute_of_its_reference(second):
    reference = at("2026-03-01 00:00") + second
    assert parse("* * * * *").next(reference) == at("2026-03-01 00:01")


def test_next_equals_the_first_start_in_every_zone():
    dice, names = random.Random(4), ["UTC", "Europe/Berlin", "Pacific/Apia",
                                     "Australia/Lord_Howe", "Africa/Cairo"]
    for _ in range(1500):
        schedule, here = parse(random_expression(dice)), zone(
            dice.choice(names))
        after = dice.randrange(at("1900-01-01 00:00"), at("2200-01-01 00:00"))
        assert schedule.next(after, here) == next(
            schedule.iter_starts(after, here), None)


def test_search_ends_if_the_only_date_is_always_in_a_gap():
    """8 March is a Sunday only when the clocks of New York jump then."""
    began = time.process_time()
    schedule = parse("*/10 2 8 3 */7")
    assert schedule.next(at("2026-01-01 00:00"), zone("America/New_York")) \
        is None
    assert schedule.next(at("2026-01-01 00:00"), zone("Europe/Berlin"))
    assert time.process_time() - began < 5


def test_matches_is_true_for_matching_local_minutes_only():
    schedule = parse("30 2 * * 1")
    assert schedule.matches(at("2026-03-02 02:30"))
    assert not schedule.matches(at("2026-03-02 02:31"))
    assert not schedule.matches(at("2026-03-03 02:30"))
    assert not parse("0 0 30 2 *").matches(at("2026-03-02 00:00"))


# --- in words -------------------------------------------------------------


@pytest.mark.parametrize("text, words", [
    ("* * * * *", "Every minute"), ("*/5 * * * *", "Every 5 minutes"),
    ("@hourly", "Every hour"), ("17 * * * *", "At minute 17 of every hour"),
    ("30 2 * * 1", "At 02:30 on Mondays"), ("@daily", "At 00:00"),
    ("@yearly", "At 00:00 on the 1st of January"),
    ("@monthly", "At 00:00 on the 1st of the month"),
    ("@weekly", "At 00:00 on Sundays"),
    ("0 9,17 * * 1-5", "At 09:00 and 17:00 on Mondays to Fridays"),
    ("*/7 * * * *", "At every 7th minute from 0 to 56 of every hour"),
    ("* 3 * * *", "Every minute of hour 3"),
    ("*/10 8-17 * * *", "Every 10 minutes of hours 8 to 17"),
    ("5 */2 * * *", "At minute 5 of every 2nd hour"),
    ("0 12 * * fri-sun", "At 12:00 on Fridays to Sundays"),
    ("0 0 13 * 5", "At 00:00 on the 13th of the month and on Fridays"),
    ("0 0 1-7 10 1", "At 00:00 on the 1st to 7th of October and on Mondays "
     "in October"),
    ("0 0 */2 * 0", "At 00:00 on Sundays that fall on every 2nd day from the "
     "1st to the 31st of the month"),
    ("0 0 1-31 * 1", "At 00:00"), ("0 0 30 2 *", "Never"),
    ("0 0 1 * 5-1", "At 00:00 on the 1st of the month"),
    ("0 0 5-1 may 1", "At 00:00 on Mondays in May"),
    ("0 0 1,2,3,22 jan,jul *", "At 00:00 on the 1st to 3rd and 22nd of "
     "January and July"),
])
def test_describe_returns_english(text, words):
    assert parse(text).describe() == words


def test_different_schedules_have_different_descriptions():
    dice, known = random.Random(7), {}
    for _ in range(3000):
        schedule = parse(random_expression(dice))
        words = schedule.describe()
        if words == "Never":
            continue
        full_days, full_week = (1 << 31) - 1, 127
        days, week = schedule.days, schedule.weekdays
        both = schedule.both
        if not both and (days == full_days or week == full_week):
            days, week, both = full_days, full_week, True
        meaning = (schedule.minutes, schedule.hours, days, schedule.months,
                   week, both)
        assert known.setdefault(words, meaning) == meaning, words


# --- zones ----------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "Europe/Berlin", "America/New_York", "Australia/Lord_Howe",
    "Africa/Casablanca", "Europe/Dublin", "Asia/Gaza", "America/Godthab",
    "Pacific/Apia", "Asia/Kathmandu", "Africa/Monrovia", "Antarctica/Troll",
    "America/Sao_Paulo", "Europe/London", "Asia/Pyongyang", "EST5EDT", "UTC",
])
def test_zone_agrees_with_the_standard_library(name, monkeypatch):
    """The zones of this machine, whose tzdata may be newer or older."""
    support.need_zone(name)
    monkeypatch.setattr(koitab, "ZONE_DIRECTORIES",
                        koitab.ZONE_DIRECTORIES[1:])
    theirs, ours = zoneinfo.ZoneInfo(name), koitab.Machine().zone(name)
    dice = random.Random(name)
    edges = [begin + nudge for begin in ours.begins for nudge in (-1, 0, 1)
             if abs(begin) < at("2037-01-01 00:00")]
    chosen = [dice.randrange(at("1850-01-01 00:00"), at("2500-01-01 00:00"))
              for _ in range(3000)]
    for instant in edges + chosen:
        moment = datetime.datetime.fromtimestamp(instant, theirs)
        assert ours.offset(instant) == moment.utcoffset().total_seconds(), \
            moment


@pytest.mark.parametrize("rule, like", [
    ("CET-1CEST,M3.5.0,M10.5.0/3", "Europe/Berlin"),
    ("EST5EDT,M3.2.0,M11.1.0", "America/New_York"),
    ("EST5EDT", "America/New_York"), ("<+0545>-5:45", "Asia/Kathmandu"),
    ("<+1030>-10:30<+11>-11,M10.1.0,M4.1.0", "Australia/Lord_Howe"),
    ("<+00>0<+02>-2,M3.5.0/1,M10.5.0/3", "Antarctica/Troll"),
    ("EET-2EEST,M3.5.0/0,M10.5.0/0", "Asia/Beirut"), ("UTC0", "UTC"),
    ("XXX3EDT4,0/0,J365/23", None),
])
def test_posix_rule_has_the_offsets_of_the_zone(rule, like):
    ours = koitab.parse_posix_tz(rule)
    if like is None:            # summer time all year round
        assert {ours.offset(at(f"2030-{month:02}-01 00:00"))
                for month in range(1, 13)} == {-4 * HOUR}
        return
    for day in range(0, 3 * 365):
        instant = at("2024-01-01 00:30") + day * DAY
        assert ours.offset(instant) == zone(like).offset(instant)


@pytest.mark.parametrize("rule", [
    "", "X", "Europe/Nowhere", "CET", "CET-1CEST,M13.5.0,M10.5.0",
    "CET-1CEST,M3.6.0,M10.5.0", "CET-1CEST,M3.5,M10.5.0", "CET-1CEST,J0,J1",
    "CET-1CEST,M3.5.0", "CET-1;id", "C" * 10_000,
])
def test_invalid_posix_rule_is_parsed_as_none(rule):
    assert koitab.parse_posix_tz(rule) is None


@pytest.mark.parametrize("rule", [
    "AAA0BBB0,M3.5.0,M10.5.0", "AAA0BBB,M3.5.0,M3.5.0", "AAA0BBB,0,0",
    "AAA24BBB-24,J1/167,J365/-167"])
def test_absurd_posix_rule_does_not_hang(rule):
    began = time.process_time()
    here = koitab.parse_posix_tz(rule)
    found = parse("30 2 * * *").iter_starts(at("2026-01-01 00:00"), here)
    assert len(list(itertools.islice(found, 100))) == 100
    assert time.process_time() - began < 2


def test_broken_zone_file_raises_only_value_error():
    dice = random.Random(3)
    data = (support.ZONES / "Europe/Berlin").read_bytes()
    for _ in range(600):
        broken = bytearray(data[:dice.randrange(len(data))])
        for _ in range(dice.randrange(3)):
            if broken:
                broken[dice.randrange(len(broken))] = dice.randrange(256)
        try:
            here = koitab.parse_tzif("broken", bytes(broken))
            here.offset(at("2026-01-01 00:00"))
        except ValueError:
            continue


@pytest.mark.parametrize("minute, instant", [
    ("2025-03-30 01:59", "2025-03-30T01:59+01:00"),
    ("2025-03-30 02:30", "2025-03-30T03:00+02:00"),     # 02:30 does not exist
    ("2025-03-30 03:00", "2025-03-30T03:00+02:00"),
    ("2025-10-26 02:30", "2025-10-26T02:30+02:00"),     # the first of two
    ("2025-10-26 03:00", "2025-10-26T03:00+01:00"),
])
def test_local_time_is_converted_to_an_instant(minute, instant):
    assert zone("Europe/Berlin").instant(at(minute)) == at(instant)


def test_days_and_dates_agree_with_the_standard_library():
    first = datetime.date(1970, 1, 1)
    for day in itertools.chain(range(-800, 800), range(-700_000, 2_900_000,
                                                       997)):
        date = first + datetime.timedelta(day)
        assert koitab.calendar_date(day) == (date.year, date.month, date.day)
        assert koitab.days_since_epoch(date.year, date.month, date.day) == day


# --- the plan: the same, for a daemon that sleeps -------------------------


@pytest.mark.parametrize("ahead, wildcard, fixed", [
    (1, 1, 1), (2, 1, 1), (5, 1, 1), (6, 6, 1), (180, 180, 1),
    (181, 181, 181),
    (0, 0, 1), (-1, -1, 1), (-179, -179, 1), (-180, -180, -180),
])
def test_first_minute_after_each_kind_of_clock_jump_is_found(
        ahead, wildcard, fixed):
    """Each is in minutes from the virtual minute."""
    first = ahead * MINUTE
    assert koitab.first_minute_after_jump(0, first, True) == wildcard * MINUTE
    assert koitab.first_minute_after_jump(0, first, False) == fixed * MINUTE


def test_clock_set_back_within_a_minute_repeats_no_start():
    begin = at("2026-03-01 00:00")
    state = state_at(begin, {"": koitab.UTC})
    jobs = [job("* * * * *")]
    state, launches = plan(jobs, state, koitab.ClockSample(
        begin + 61, 61.0))
    assert len(launches) == 1
    later, launches = plan(jobs, state, koitab.ClockSample(
        begin + 50, 70.0))
    assert (later is state, launches) == (True, [])


def first_due(jobs, state) -> int | None:
    """Return the instant of the first start of all jobs, or None."""
    return min((due for due in (koitab.next_due(each, state) for each in jobs)
                if due is not None), default=None)


def plan(jobs, state, now):
    """Return the result of `plan` for jobs of which no due time is known."""
    return koitab.plan(jobs, state, now, first_due(jobs, state))[:2]


def state_at(instant: float, zones: dict, before=None):
    """The state of a scheduler that starts at an instant, at 0 ticks."""
    return koitab.state_for_zones(koitab.ClockSample(instant, 0.0), zones,
                                  before)


def job(spec: str, line: int = 1, place: str = ""):
    return koitab.Job(
        line, "", "", spec, parse(spec), "", "true", "true", "", (), {},
        koitab.Settings(zone=place))


def started(jobs, minutes, checks, here):
    """Return (turn, local minute, line) of the starts of a daemon that calls
    `plan` when a start is due, and at the turns in `checks`."""
    def sample(turn):
        return koitab.ClockSample(minutes[turn] * MINUTE + 0.5,
                                  1000.0 + turn * MINUTE)

    state = koitab.state_for_zones(sample(0), {"": here})
    found = []
    due = first_due(jobs, state)
    for turn in range(1, len(minutes)):
        unset = state.sample.instant + sample(turn).ticks \
            - state.sample.ticks
        if turn in checks or due is not None and unset >= due:
            state, launches = plan(jobs, state, sample(turn))
            due = first_due(jobs, state)
            found += [(turn, launch.minute // MINUTE, launch.job.line)
                      for launch in launches]
    return found


class SetMachine:
    """A machine whose clocks a test sets."""

    def __init__(self):
        self.clock, self.instant, self.seconds = self, 0.0, 0.0

    def now(self):
        return self.instant

    def ticks(self):
        return self.seconds


def started_by_planner(jobs, minutes, checks, here):
    """Return (turn, line) of the same daemon's starts by koid's Planner,
    which passes to `plan` only the jobs that it knows to be due."""
    machine, found = SetMachine(), []
    file = types.SimpleNamespace(path="tab", user="root")
    planner = koitab.Planner(
        machine, types.SimpleNamespace(scheduled_jobs=[
            koitab.ScheduledJob(one, file, 0) for one in jobs]), None,
        types.SimpleNamespace(set_problem=lambda *_: None))
    for turn, minute in enumerate(minutes):
        machine.instant = minute * MINUTE + 0.5
        machine.seconds = 1000.0 + turn * MINUTE
        if not turn:
            planner.state = koitab.state_for_zones(planner.sample(),
                                                   {"": here})
        due, seen = planner.first_due(), planner.state.sample
        unset = seen.instant + machine.seconds - seen.ticks
        if turn in checks or due is not None and unset >= due:
            found += [(turn, queued.scheduled.line)
                      for queued in planner.due()[0]]
    return found


def clock_that_is_set(begin: int, turns: int, steps: dict) -> list[int]:
    """Return the machine's minute at each turn. `steps` maps a turn to the
    minutes by which the clock jumps there."""
    minutes, ahead = [], 0
    for turn in range(turns):
        ahead += steps.get(turn, 0)
        minutes.append(begin + turn + ahead)
    return minutes


@pytest.mark.parametrize("place, begin, steps", [
    ("UTC", "2026-03-01 00:00", {}),
    ("UTC", "2026-03-01 00:00", {500: 3}),
    ("UTC", "2026-03-01 00:00", {500: 10}),
    ("UTC", "2026-03-01 00:00", {500: -11}),
    ("UTC", "2026-03-01 00:00", {500: 240}),
    ("UTC", "2026-03-01 00:00", {500: -240}),
    ("UTC", "2026-03-01 00:00", {500: -1, 900: 1, 950: 180, 1400: 181}),
    ("UTC", "2026-03-01 00:00", {500: -179, 510: 5, 2000: -180}),
    ("Europe/Berlin", "2026-03-28 12:00", {}),
    ("Europe/Berlin", "2026-10-24 12:00", {}),
    ("Europe/Berlin", "2026-10-24 12:00", {780: 10, 800: -10}),
    ("Europe/Berlin", "2026-03-28 12:00", {779: -5, 790: 60}),
    ("Australia/Lord_Howe", "2026-04-04 00:00", {}),
    ("Australia/Lord_Howe", "2026-10-03 00:00", {}),
    ("Pacific/Apia", "2011-12-29 12:00", {}),
])
def test_sleeping_daemon_makes_the_starts_of_cron(place, begin, steps):
    here, dice = zone(place), random.Random(f"{place}{begin}{steps}")
    minutes = clock_that_is_set(at(begin) // MINUTE, 2500, steps)
    local = [minute + here.offset(minute * MINUTE) // MINUTE
             for minute in minutes]
    events = list(cron(local))
    jobs = [job(spec, line) for line, spec in enumerate(
        EXPRESSIONS[1::2] + [random_expression(dice) for _ in range(8)])]
    wanted = sorted((event[0], event[1], one.line) for one in jobs
                    for event in ModelSchedule(one.when).picks(events))
    # It notices a set clock immediately, and sometimes wakes without reason.
    checks = set(steps) | {turn for turn in range(2500)
                          if dice.random() < 0.03}
    assert sorted(started(jobs, minutes, checks, here)) == wanted
    assert sorted(started_by_planner(jobs, minutes, checks, here)) == sorted(
        (turn, line) for turn, _, line in wanted)
    assert len(wanted) > 100


def test_late_wakeup_neither_repeats_nor_loses_a_start():
    here, dice = zone("Europe/Berlin"), random.Random(5)
    jobs = [job(spec, line) for line, spec in enumerate(
        ["*/20 * * * *", "30 2 * * *", "0,10 1-4 * * *", "17 */3 * * *"])]
    for begin in ("2026-03-28 20:00", "2026-10-24 20:00"):
        now = at(begin)
        state, end = state_at(now, {"": here}), now + DAY
        found = []
        while state.sample.instant < end:
            due = first_due(jobs, state)
            now = dice.choice([
                due + dice.random() * 59, due + dice.random(),
                max(due - dice.random() * 900, state.sample.instant + 0.01)])
            state, launches = plan(
                jobs, state, koitab.ClockSample(now, now - at(begin)))
            found += [(launch.job.line, launch.due) for launch in launches]
            if not launches and state.sample.instant != now:
                state, launches = plan(
                    jobs, state, koitab.ClockSample(due, due - at(begin)))
                found += [(launch.job.line, launch.due)
                          for launch in launches]
        wanted = [(one.line, start) for one in jobs for start in before(
            one.schedule.iter_starts(at(begin), here), now + 0.001)]
        assert sorted(found) == sorted(wanted)


def test_after_a_halt_fixed_jobs_catch_up_and_wildcard_jobs_run_once():
    here = koitab.UTC
    jobs = [job("* * * * *", 1), job("0-59 * * * *", 2)]
    jobs[1] = job("0-59 0-23 * * *", 2)
    begin = at("2026-03-01 00:00")
    state = state_at(begin, {"": here})
    state, launches = plan(
        jobs, state, koitab.ClockSample(begin + 600, 600.0))
    assert sum(launch.job.line == 1 for launch in launches) == 1
    assert [launch.minute for launch in launches if launch.job.line == 2] == [
        begin + MINUTE * n for n in range(1, 11)]
    assert {launch.due for launch in launches} == {begin + 600}


def test_each_zone_has_its_own_virtual_clock():
    """cronie loses the hour of a CRON_TZ job while its own zone catches up."""
    berlin = zone("Europe/Berlin")
    jobs = [job("30 2 * * *", 1), job("30 1 * * *", 2, "UTC")]
    begin = at("2026-10-24 22:00")
    state = state_at(begin, {"": berlin, "UTC": koitab.UTC})
    found = []
    for minute in range(1, 600):
        state, launches = plan(jobs, state, koitab.ClockSample(
            begin + minute * 60, minute * 60.0))
        found += [(launch.job.line, launch.due) for launch in launches]
    assert found == [(1, at("2026-10-25T02:30+02:00")),
                     (2, at("2026-10-25T01:30+00:00"))]


def test_new_zone_starts_with_the_next_minute():
    begin = at("2026-03-01 00:00")
    state = state_at(begin, {"": koitab.UTC})
    later = state_at(begin, {"": koitab.UTC, "X": koitab.UTC}, state)
    assert later.zone_clocks[""] is state.zone_clocks[""]
    assert later.zone_clocks["X"].virtual == begin


def test_jobs_of_one_minute_start_last_line_first_as_in_cron():
    begin = at("2026-03-01 00:00")
    jobs = [job("* * * * *", line) for line in (1, 2, 3)]
    state = state_at(begin, {"": koitab.UTC})
    _, launches = plan(jobs, state,
                              koitab.ClockSample(begin + 60, 60.0))
    assert [launch.job.line for launch in launches] == [3, 2, 1]
