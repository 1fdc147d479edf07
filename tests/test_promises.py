"""What the file says of itself is true: proved from its text, not run."""

from __future__ import annotations

import ast
import builtins
import os
import re
import symtable
import sys

import pytest

import support

mission = support.load("mission")

SOURCES = {name: (support.ROOT / f"{name}.py").read_text(encoding="utf-8")
           for name in ("mission", "koitab")
           if (support.ROOT / f"{name}.py").exists()}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
each_file = pytest.mark.parametrize("name", SOURCES)

RULE = "# " + "=" * 74
# What a section touches, and the letters of those it runs as.
TOUCHES, RUNS_AS = r"([a-z]+(?:, [a-z]+)*)", r"([A-Z](?: [A-Z])*)"
MARKER = re.compile(
    rf"^{RULE}\n# (\w+): (.+?) +\({TOUCHES}; {RUNS_AS}\)\n#\n"
    rf"((?:#(?: .+)?\n)+){RULE}\n", re.M)
ROW = re.compile(rf"^ *(\d+) (\w+) +(\S.*\?) +\({TOUCHES}\) +{RUNS_AS}$",
                 re.M)
ACCEPTED = os.environ.get("GOLDEN") == "accept"
LETTERS = {"mission": set("COU"), "koitab": set("RJUC")}
PARTS = ["1 values", "2 koid", "3 network", "4 commands"]

# Names that a section which touches nothing may not say. `posixpath` only
# reckons with text, and is allowed.
TOUCHING = set(
    "os open subprocess socket time print input exec eval compile "
    "__import__ sys pwd grp fcntl select shutil tempfile pathlib glob "
    "urllib http smtplib ssl random secrets uuid datetime threading "
    "multiprocessing resource platform getpass io breakpoint".split())
# Only to name a signal: SIGTERM and the like are constants.
HARMLESS = {"signal": {"Signals"}}

NOT_IN_3_9 = {"tomllib", "annotationlib", "pathlib.types", "compression"}
GONE_BY_3_14 = set(
    "aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr "
    "imp lib2to3 mailcap msilib nis nntplib ossaudiodev pipes smtpd sndhdr "
    "spwd sunau telnetlib uu xdrlib binhex formatter parser symbol".split())
# module.name that is newer than 3.9, older than 3.14, or both.
NOT_EVERYWHERE = set(
    "datetime.UTC datetime.utcnow datetime.utcfromtimestamp "
    "hashlib.file_digest itertools.pairwise itertools.batched "
    "contextlib.chdir enum.StrEnum re.NOFLAG re.template re.TEMPLATE "
    "typing.Self inspect.getargspec locale.getdefaultlocale "
    "locale.resetlocale locale.format asyncio.coroutine ast.Num ast.Str "
    "ast.Bytes ast.NameConstant ast.Ellipsis unittest.makeSuite "
    "pkgutil.find_loader pkgutil.get_loader pkgutil.ImpImporter "
    "ssl.wrap_socket ssl.match_hostname ssl.PROTOCOL_TLS "
    "sqlite3.version sqlite3.OptimizedUnicode tempfile.mktemp "
    "configparser.SafeConfigParser importlib.find_loader "
    "sys.stdlib_module_names sys.exception sys.orig_argv os.pidfd_send "
    "math.cbrt operator.call statistics.correlation "
    "traceback.print_exception logging.warn threading.currentThread "
    "urllib.request.URLopener urllib.request.FancyURLopener "
    "email.utils.localtime types.EllipsisType shutil.ExecError "
    "os.process_cpu_count os.login_tty time.clock".split())

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
TOO_WIDE = {"SAMPLE"}   # its own lines are measured below
LONGEST_FUNCTION, WIDEST_LINE = 45, 79


class Section:
    """A section of a file: its row, its comment and its lines."""

    def __init__(self, match, text: str, end: int):
        self.name, self.question, self.touches = match.group(1, 2, 3)
        self.runs_as = match[4]
        self.comment = match[5].splitlines()
        self.start = text.count("\n", 0, match.start()) + 1
        self.end = text.count("\n", 0, end)
        self.text = text[match.end():end]
        self.row = (str(text.count("\n", match.start(), end)), self.name,
                    self.question, self.touches, self.runs_as)

    def holds(self, node) -> bool:
        return self.start <= node.lineno <= self.end


def sections(name: str) -> list[Section]:
    text = SOURCES[name]
    found = list(MARKER.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [Section(match, text, end) for match, end in zip(found, ends)]


def defined(node) -> list[str]:
    """The names that a statement of the module binds."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [
        node.target] if isinstance(node, ast.AnnAssign) else []
    return [leaf.id for target in targets for leaf in ast.walk(target)
            if isinstance(leaf, ast.Name)]


def homes(name: str) -> dict[str, int]:
    """Each name of the module -> the number of its section, 0 the head."""
    parts, found = sections(name), {}
    for node in TREES[name].body:
        place = next((number for number, part in enumerate(parts, start=1)
                      if part.holds(node)), 0)
        for word in defined(node):
            found.setdefault(word, place)
    return found


def globals_of(table) -> set[str]:
    """What a function or class, and those inside it, ask the module for."""
    found = {symbol.get_name() for symbol in table.get_symbols()
             if symbol.is_global() and symbol.is_referenced()}
    return found.union(*map(globals_of, table.get_children()))


def uses(name: str):
    """Yield (line, names of the module that are used there)."""
    for table in symtable.symtable(SOURCES[name], name, "exec"
                                   ).get_children():
        yield table.get_lineno(), globals_of(table)
    for node in TREES[name].body:
        if isinstance(node, DEFINITIONS):
            outside = [*node.decorator_list, *getattr(node, "bases", ())]
        elif isinstance(node, (ast.Import, ast.ImportFrom, ast.If)):
            continue        # the last lines call main
        else:
            outside = [node]
        leaves = [leaf for part in outside for leaf in ast.walk(part)]
        own = {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)
               and isinstance(leaf.ctx, ast.Store)} - set(defined(node)) | {
            leaf.arg for leaf in leaves if isinstance(leaf, ast.arg)}
        yield node.lineno, {leaf.id for leaf in leaves if isinstance(
            leaf, ast.Name) and isinstance(leaf.ctx, ast.Load)} - own


# --- the file introduces itself -------------------------------------------


def write_numbers_of_lines(name: str) -> None:
    """Write into the docstring's table how long each section is now."""
    lines = {part.name: part.row[0] for part in sections(name)}
    path = support.ROOT / f"{name}.py"
    path.write_text(ROW.sub(
        lambda row: row[0].replace(f"{row[1]:>4} ", f"{lines[row[2]]:>4} ", 1),
        SOURCES[name]))


@each_file
def test_table_of_the_docstring_has_the_sections_in_order_and_their_lines(
        name):
    table = ROW.findall(ast.get_docstring(TREES[name], clean=False))
    expected = [part.row for part in sections(name)]
    assert [row[1:] for row in table] == [row[1:] for row in expected]
    if ACCEPTED:
        write_numbers_of_lines(name)
    else:
        assert table == expected, "GOLDEN=accept make test writes the numbers"
    assert len(table) > 5


@each_file
def test_each_letter_of_the_table_is_explained_above_it(name):
    letters = {letter for part in sections(name)
               for letter in part.runs_as.split()}
    assert letters == LETTERS[name]
    head = ast.get_docstring(TREES[name], clean=False)
    intro = head[:ROW.search(head).start()]
    assert {letter for letter in letters
            if not re.search(rf"\b{letter} the \w|\b{letter} a \w", intro)
            } == set()


def test_the_table_of_koitab_has_the_four_parts_in_their_order():
    head = ast.get_docstring(TREES["koitab"], clean=False)
    assert re.findall(r"^ (\d \w+)$", head, re.M) == PARTS


@each_file
def test_each_section_is_introduced_in_two_to_eight_lines(name):
    assert {part.name: len(part.comment) for part in sections(name)
            if not 2 <= len(part.comment) <= 8} == {}


@each_file
def test_every_rule_line_is_part_of_a_section_marker(name):
    assert SOURCES[name].count(RULE) == 2 * len(sections(name))


@each_file
def test_every_class_has_a_docstring_or_described_fields(name):
    silent = [node.name for node in TREES[name].body
              if isinstance(node, ast.ClassDef)
              and not ast.get_docstring(node)
              and not any(isinstance(part, ast.AnnAssign)
                          for part in node.body)]
    assert silent == []


def test_essay_names_only_existing_code():
    text = SOURCES["koitab"]
    essay = text[text.index("# HOW IT WORKS"):text.index("from __future__")]
    words = set(re.findall(r"`([A-Za-z_]+)`", essay)) | set(re.findall(
        r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)+s?\b", essay))
    defined_names = {node.name for node in ast.walk(TREES["koitab"])
                     if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert {word for word in words if word not in defined_names
            and word.rstrip("s") not in defined_names} == set()
    assert len(words) > 15
    assert 50 < essay.count("\n") < 80


# --- a section touches what it says, and uses what is above it ------------


def touching_names(name: str) -> set[str]:
    """Names of the module that touch the host, directly or by others."""
    found: set[str] = set()
    while True:
        more = {word for node in TREES[name].body for word in defined(node)
                if word not in found and any(
                    isinstance(leaf, ast.Name) and leaf.id in TOUCHING | found
                    for leaf in ast.walk(node))}
        if not more:
            return found
        found |= more


@each_file
def test_section_that_touches_nothing_uses_no_module_with_effects(name):
    forbidden = TOUCHING | touching_names(name)
    pure = [part for part in sections(name) if part.touches == "nothing"]
    guilty = []
    for part in pure:
        for node in (n for n in TREES[name].body if part.holds(n)):
            for leaf in ast.walk(node):
                words = {leaf.id} if isinstance(leaf, ast.Name) else {
                    alias.name.split(".")[0] for alias in leaf.names
                } if isinstance(leaf, ast.Import) else {
                    leaf.module} if isinstance(leaf, ast.ImportFrom) else ()
                guilty += [f"{part.name} names {word} at line {leaf.lineno}"
                           for word in words if word in forbidden]
    assert guilty == []
    assert pure


@each_file
def test_a_section_that_touches_nothing_only_names_signals(name):
    guilty = [
        f"{part.name}: {leaf.value.id}.{leaf.attr} at line {leaf.lineno}"
        for part in sections(name) if part.touches == "nothing"
        for node in TREES[name].body if part.holds(node)
        for leaf in ast.walk(node) if isinstance(leaf, ast.Attribute)
        and isinstance(leaf.value, ast.Name) and leaf.value.id in HARMLESS
        and leaf.attr not in HARMLESS[leaf.value.id]]
    assert guilty == []


@each_file
def test_a_section_uses_only_names_from_itself_and_from_above(name):
    parts, home = sections(name), homes(name)
    early = []
    for line, words in uses(name):
        here = sum(part.start <= line for part in parts)
        early += [f"line {line} ({parts[here - 1].name if here else 'head'})"
                  f" uses {word} of {parts[home[word] - 1].name}"
                  for word in words if home.get(word, 0) > here]
    assert early == []


@pytest.mark.parametrize("program, count", [
    ("AGENT_SECTIONS", 4), ("CLAIM_SECTIONS", 5)])
def test_the_agents_program_uses_only_names_from_its_own_sections(
        program, count):
    """koid executes the head and these sections alone, as another program."""
    parts, home = sections("koitab"), homes("koitab")
    own = {number for number, part in enumerate(parts, start=1)
           if part.name in getattr(support.load("koitab"), program)}
    assert len(own) == count
    foreign = []
    for line, words in uses("koitab"):
        here = sum(part.start <= line for part in parts)
        foreign += [f"line {line} ({parts[here - 1].name}) uses {word}"
                    for word in words if here in own
                    and home.get(word, 0) not in own | {0}]
    assert foreign == []


@each_file
def test_every_name_is_defined_exactly_once(name):
    """Checked without a run: an undefined name fails only when it is used."""
    bound = {alias.asname or alias.name.split(".")[0]
             for node in TREES[name].body
             if isinstance(node, (ast.Import, ast.ImportFrom))
             for alias in node.names}
    known = set(homes(name)) | bound | set(dir(builtins)) | {
        "__file__", "__name__"}
    # An annotation is never evaluated, so it may name what is imported late.
    missing = {word for _, words in uses(name) for word in words} - known
    assert missing - annotation_words(name) == set()
    names = [word for node in TREES[name].body for word in defined(node)]
    assert sorted({word for word in names if names.count(word) > 1}) == []


def annotation_words(name: str) -> set[str]:
    notes = [getattr(node, field) for node in ast.walk(TREES[name])
             for field in ("annotation", "returns")
             if getattr(node, field, None)]
    return {leaf.id for note in notes for leaf in ast.walk(note)
            if isinstance(leaf, ast.Name)}


@pytest.mark.parametrize("section", ["Common", "Client", "Manual"])
def test_shared_section_is_the_same_text_in_both_files(section):
    texts = [part.text for name in SOURCES for part in sections(name)
             if part.name == section]
    assert len(texts) == 2
    assert texts[0] == texts[1]


# --- it needs Python 3.9 and nothing else ---------------------------------


def imported(name: str):
    """(module, line) of every import, lazy ones too."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno)
                        for alias in node.names)


@each_file
def test_imports_are_of_the_standard_library(name):
    if not hasattr(sys, "stdlib_module_names"):     # before 3.10
        import importlib.util
        import sysconfig
        home = sysconfig.get_path("stdlib")

        def known(module: str) -> bool:
            spec = importlib.util.find_spec(module)
            return spec.origin in ("built-in", "frozen", None) \
                or spec.origin.startswith(home) \
                and "site-packages" not in spec.origin
    else:
        def known(module: str) -> bool:
            return module in sys.stdlib_module_names
    roots = {module.split(".")[0] for module, _ in imported(name)}
    assert {root for root in roots - {"__future__"} if not known(root)} \
        == set()


@each_file
def test_imported_modules_exist_in_python_3_9_to_3_14(name):
    gone = NOT_IN_3_9 | GONE_BY_3_14 | NOT_EVERYWHERE
    assert [f"{module} at line {line}" for module, line in imported(name)
            if module in gone or module.split(".")[0] in gone] == []


@each_file
def test_every_used_name_exists_in_all_supported_pythons(name):
    spelled = {f"{leaf.value.id}.{leaf.attr}": leaf.lineno
               for leaf in ast.walk(TREES[name])
               if isinstance(leaf, ast.Attribute)
               and isinstance(leaf.value, ast.Name)}
    assert {word: line for word, line in spelled.items()
            if word in NOT_EVERYWHERE} == {}
    bare = {leaf.id for leaf in ast.walk(TREES[name])
            if isinstance(leaf, ast.Name)}
    assert bare & {"aiter", "anext", "ExceptionGroup", "EncodingWarning",
                   "BaseExceptionGroup", "PythonFinalizationError"} == set()


@each_file
def test_the_file_parses_as_python_3_9(name):
    ast.parse(SOURCES[name], feature_version=(3, 9))


@each_file
def test_no_call_has_an_argument_that_3_9_lacks(name):
    late = {"zip": {"strict"}, "dataclass": {"slots", "kw_only"},
            "Popen": {"process_group"}, "rmtree": {"onexc", "dir_fd"},
            "TemporaryDirectory": {"delete", "ignore_cleanup_errors"},
            "NamedTemporaryFile": {"delete_on_close"},
            "bisect_left": {"key"}, "bisect_right": {"key"}}
    guilty = []
    for call in ast.walk(TREES[name]):
        if isinstance(call, ast.Call):
            called = getattr(call.func, "attr", getattr(call.func, "id", ""))
            guilty += [f"{called}({word.arg}=) at line {call.lineno}"
                       for word in call.keywords
                       if word.arg in late.get(called, ())]
    assert guilty == []


@each_file
def test_no_running_expression_joins_types_with_a_bar(name):
    """`X = int | None` is an error in 3.9; in an annotation it is not."""
    text = TREES[name]
    notes = {id(leaf) for node in ast.walk(text)
             for field in ("annotation", "returns")
             if getattr(node, field, None)
             for leaf in ast.walk(getattr(node, field))}
    types = {"int", "str", "float", "bytes", "dict", "list", "tuple", "set"}
    assert [node.lineno for node in ast.walk(text)
            if isinstance(node, ast.BinOp) and id(node) not in notes
            and isinstance(node.op, ast.BitOr)
            and any(isinstance(side, ast.Constant) and side.value is None
                    or isinstance(side, ast.Name) and side.id in types
                    for side in (node.left, node.right))] == []


# --- it can be read in less, in 80 columns, at night ----------------------


@each_file
def test_no_function_is_longer_than_45_lines(name):
    assert {node.name: node.end_lineno - node.lineno + 1
            for node in ast.walk(TREES[name])
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.end_lineno - node.lineno >= LONGEST_FUNCTION} == {}


@each_file
def test_no_line_is_wider_than_79_columns(name):
    wide = {node.lineno for node in TREES[name].body
            for word in defined(node) if word in TOO_WIDE}
    assert [f"{name}.py:{row}: {len(line)}" for row, line in enumerate(
        SOURCES[name].splitlines(), start=1)
        if len(line) > WIDEST_LINE and row not in wide] == []


@each_file
def test_no_line_ends_in_blanks_or_contains_a_tab(name):
    assert [row for row, line in enumerate(
        SOURCES[name].split("\n"), start=1)
        if line != line.rstrip() or "\t" in line] == []


# --- the manual says all of it, and nothing else --------------------------


def all_keys(record=None, path: str = "") -> set[str]:
    """Every key that a configuration may have, by its path."""
    found = set()
    for key, (kind, _, _) in (record or mission.Config).keys.items():
        if kind.record:
            mark = {"list": "[]", "map": ".*"}.get(kind.form, "")
            found |= all_keys(kind.record, f"{path}{key}{mark}.")
        else:
            found.add(path + key)
    return found


def test_every_configuration_key_has_a_description():
    records = [mission.Config] + [
        kind.record for record in (mission.Config, mission.Mail)
        for kind, _, _ in record.keys.values() if kind.record]
    assert len(records) == 11
    assert [key for record in records
            for key, (_, _, meaning) in record.keys.items()
            if not meaning] == []


def test_every_key_of_the_configuration_is_in_its_topic():
    terms = re.findall(r"^  (\S+)$", mission.topic_text("config"), re.M)
    assert {term.replace("NAME", "*") for term in terms} == all_keys()


def test_every_result_and_metric_is_in_the_topic_status():
    text = mission.topic_text("status")
    record = {"result": "ok", "started": 0, "seconds": 1, "errors": 0,
              "warnings": 0, "tasks": []}
    metrics = re.findall(r"# HELP (\S+)", mission.metrics_text(record, 0, "m"))
    assert metrics
    assert [word for word in [*metrics, *mission.HEALTH_WORDS]
            if not re.search(rf"\b{word}\b", text, re.I)] == []


def test_every_option_is_in_the_manual():
    options = {name for option in mission.OPTIONS.values()
               for name in option.names}
    manual = set(re.findall(r"^  (--?[A-Za-z-]+)(?:, (--[a-z-]+))?",
                            mission.manual_text(), re.M))
    assert {name for names in manual for name in names if name} == options


def test_every_command_is_in_the_usage_and_the_manual():
    for command in mission.COMMANDS:
        assert re.search(rf"^.{{8}}{command}\b", mission.usage(), re.M)
        assert re.search(rf"^  mission {command}\b", mission.manual_text(),
                         re.M)


EXITS = {value for word, value in vars(mission).items()
         if word.startswith("EXIT_")}


@pytest.mark.parametrize("text", [mission.manual_text(),
                                  mission.topic_text("status")],
                         ids=["manual", "topic"])
def test_every_exit_status_is_in_the_manual_and_its_topic(text):
    for value in EXITS:
        assert re.search(rf"^  {value}\b", text, re.M)


# --- the sample -----------------------------------------------------------


def test_mission_sample_json_is_what_init_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mission, "sample_user", lambda: None)
    assert mission.main(["init"]) == 0
    written = (tmp_path / "mission.config.json").read_bytes()
    assert written == (support.ROOT / "mission.sample.json").read_bytes()


def test_sample_fits_79_columns():
    assert [line for line in mission.SAMPLE.splitlines()
            if len(line) > 79] == []


# --- what people read is plain English ------------------------------------

# Words that read like a translation, or that name another thing.
UNPLAIN = re.compile(
    r"(?<!there )\b(?:is|are|was) no\b(?! longer)|\bis none\b|\btells?\b"
    r"|\btold\b|\bis asked\b|\bstands\b|\bgoes on\b|\bcannot go on\b"
    r"|\bhang(?:s|ing)? up\b|\bhung up\b|\blets? go\b|\bveil|\bvoid\b"
    r"|\btakes? over\b|\bof (?:its|one's|their) own\b|\bof ours\b"
    r"|\bmeanwhile\b|\bbeside\b|\ball the same\b|\bso many\b|\bmends?\b"
    r"|\bdeeds?\b|\btrouble\b|\bfolders?\b|\bwhoever\b|\bverdict\b"
    r"|\bstrangers?\b|\bhe\b|\bhis\b|\bshe\b", re.I)
PLAIN_ANYWAY = {    # line of a string -> why it may stay
    "verdict": "a key of mission's history before 1.0, which is still read",
    "trouble": "a result in mission's history before 1.0",
}


def lines_people_read(name: str) -> set[str]:
    """The lines of all strings that are not docstrings, without the comments
    of the page's script."""
    docstrings = {id(node.value) for node in ast.walk(TREES[name])
                  if isinstance(node, ast.Expr)}
    return {line.partition(" // ")[0].strip()
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and id(node) not in docstrings
            for line in node.value.split("\n")
            if not line.lstrip().startswith("//")}


def test_no_text_uses_words_that_read_like_a_translation():
    found = {line for name in SOURCES for line in lines_people_read(name)
             if UNPLAIN.search(line)}
    assert found - set(PLAIN_ANYWAY) == set()
    assert set(PLAIN_ANYWAY) <= found       # nothing is allowed in vain


# The name of a test begins with the subject of a sentence.
NO_SUBJECT = re.compile(r"(?:what|who|whose|which|how|that|it|of|from)\b")


def test_names_of_tests_begin_with_a_subject_and_use_plain_words():
    names = {name.replace("_", " ")
             for path in (support.ROOT / "tests").rglob("test_*.py")
             for name in re.findall(r"^(?:async )?def test_(\w+)",
                                    path.read_text(), re.M)}
    assert {name for name in names if UNPLAIN.search(name)
            or NO_SUBJECT.match(name) or name.count(" ") < 2} == set()
    assert len(names) > 2000


# Limits that the tests make short, so that none of them waits so long. The
# first is the contract's; the manual and comments name the others.
LIMITS = [
    ("mission", "TERM_TO_KILL", 10), ("mission", "KILL_TO_GONE", 10),
    ("mission", "GRACE", 2), ("mission", "SILENCE", 1),
    ("mission", "LINE_SECONDS", 1), ("mission", "LOCK_AGE", 15 * 60),
    ("koitab", "KILL_AFTER", 10), ("koitab", "LINGER", 1),
    ("koitab", "TRY_FOR", 60), ("koitab", "MAIL_TIME", 60),
    ("koitab", "REQUEST_TIME", 10), ("koitab", "HOLD", 25),
    ("koitab", "PATIENCE", 15), ("koitab", "WRITE_AGAIN", 5),
    ("koitab", "WAIT_FOR_CLOCK", 300), ("koitab", "SEARCH_TIME", 1),
    ("koitab", "ROUNDS", 600_000),
]


@pytest.mark.parametrize("program, name, value", LIMITS)
def test_limit_that_tests_shorten_has_its_documented_value(program, name,
                                                           value):
    assert getattr(support.load(program), name) == value
