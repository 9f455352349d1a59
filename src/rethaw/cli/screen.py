"""What a terminal shows after some output, as the bytes that make another terminal show the same.

Output alone does not say it: it was written for a terminal of other sizes as it went, and it may have asked questions that
must not be asked again. So it is carried out here, on a screen of cells, like on a terminal of the VT100's kind.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

Cell = tuple[str, str]  # a letter with what is written over it ("" behind a wide one), and its SGR parameters
_BLANK: Cell = (" ", "")
_UNFINISHED = 1 << 16  # bytes of a sequence whose end has not come
_TOKEN = re.compile(
    r"""(?P<text>[^\x00-\x1f\x7f-\x9f]+)
      | \x1b\[(?P<mark>[<-?]?)(?P<args>[0-9;:]*)(?P<between>[ -/]*)(?P<final>[@-~])
      | \x1b\](?P<osc>[^\x07\x1b]*)(?:\x07|\x1b\\)
      | \x1b[PX^_][^\x1b]*\x1b\\
      | \x1b(?P<more>[ -/]+)(?P<end>[0-~])
      | \x1b(?P<escape>[0-OQ-WYZ\\`a-~])
      | (?P<control>[\x00-\x1a\x1c-\x1f\x7f-\x9f])""",
    re.VERBOSE | re.DOTALL,
)
_LINES = str.maketrans("`afgjklmnopqrstuvwxyz{|}~", "◆▒°±┘┐┌└┼⎺⎻─⎼⎽├┤┴┬│≤≥π≠£·")
_ON: tuple[int, ...] = (7, 25)  # modes that are on by themselves
_ALTERNATE = (47, 1047, 1049)
_NOT_KEPT = (3, 1048, 2026, *_ALTERNATE)
# Whatever a program has set: no mouse, no alternate screen, the cursor visible, letters plain.
RESET = (
    b"\x1b[?1049l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1005l\x1b[?1006l\x1b[?1015l\x1b[?2004l\x1b[?1l\x1b[?5l"
    b"\x1b[?6l\x1b[?7h\x1b[?25h\x1b[4l\x1b[20l\x1b>\x1b(B\x0f\x1b[r\x1b[m"
)


class _Cursor:
    """Where letters go and how they look."""

    def __init__(self) -> None:
        self.y = self.x = 0
        self.wrap = False  # the last column is full: the next letter begins a line
        self.flags: set[int] = set()
        self.colors = ["", ""]
        self.style = ""
        self.sets = ["B", "B"]
        self.shift = 0
        self.origin = False

    def copy(self) -> _Cursor:
        new = _Cursor()
        new.__dict__ = {**self.__dict__, "flags": set(self.flags), "colors": [*self.colors], "sets": [*self.sets]}
        return new


class Screen:
    """A terminal without anybody who looks at it."""

    def __init__(self, rows: int, cols: int) -> None:
        self.rows, self.cols = rows, cols
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._start()

    def _start(self) -> None:
        self.lines = [self._empty() for _ in range(self.rows)]
        self.cursor = _Cursor()
        self._saved: _Cursor | None = None
        self._main: tuple[list[list[Cell]], _Cursor] | None = None  # while the alternate screen is shown
        self._top, self._bottom = 0, self.rows - 1
        self.modes = set(_ON)
        self._plain_modes = set[int]()
        self._tabs = set(range(8, self.cols, 8))
        self._keypad = False
        self._keyboards: list[str] = []  # of the kitty protocol, pushed
        self._other_keys = ""
        self._shape = ""
        self._title = ""
        self._last = " "
        self._wide = False  # whether a wide letter was ever written

    def _empty(self, style: str = "") -> list[Cell]:
        return [(" ", style)] * self.cols

    @property
    def text(self) -> list[str]:
        """Its lines, without what is blank at their ends."""
        return ["".join(cell[0] for cell in line).rstrip() for line in self.lines]

    # ------------------------------------------------------------ output

    def feed(self, data: bytes) -> None:
        """Carry out what a program wrote."""
        source = self._held + self._decoder.decode(data)
        self._held = ""
        at = 0
        while at < len(source):
            found = _TOKEN.match(source, at)
            if found is None:
                if len(source) - at < _UNFINISHED and _may_go_on(source, at):
                    self._held = source[at:]
                    return
                at += 1
                continue
            at = found.end()
            self._carry_out(found)

    def _carry_out(self, found: re.Match[str]) -> None:
        kind = found.lastgroup
        if kind == "text":
            self._write(found["text"])
        elif kind == "control":
            self._control(found["control"])
        elif kind == "final":
            self._sequence(found["mark"], found["args"], found["between"], found["final"])
        elif kind == "osc":
            number, _, text = found["osc"].partition(";")
            if number in ("0", "2"):
                self._title = text
        elif kind == "escape":
            self._escape(found["escape"])
        elif kind == "end" and found["more"] in ("(", ")"):
            self.cursor.sets["()".index(found["more"])] = found["end"]
        elif kind == "end" and found["more"] + found["end"] == "#8":
            self.lines = [[("E", "")] * self.cols for _ in range(self.rows)]

    def _write(self, text: str) -> None:
        cursor = self.cursor
        if cursor.sets[cursor.shift] == "0":
            text = text.translate(_LINES)
        self._last = text[-1]
        if text.isascii() and 4 not in self._plain_modes:
            self._write_plain(text)
            return
        for char in text:
            width = _width(char)
            if width == 0:
                self._combine(char)
                continue
            if cursor.wrap or cursor.x + width > self.cols:
                self._wrap()
            line = self.lines[cursor.y]
            self._wide = self._wide or width == 2
            cells = [(char, cursor.style), ("", cursor.style)][:width]
            if 4 in self._plain_modes:
                line[cursor.x : cursor.x] = cells
                del line[self.cols :]
                self._mend(line)
            else:
                self._part(line, cursor.x)
                self._part(line, cursor.x + width)
                line[cursor.x : cursor.x + width] = cells
            self._advance(width)

    def _write_plain(self, text: str) -> None:
        cursor, at = self.cursor, 0
        while at < len(text):
            if cursor.wrap:
                self._wrap()
            part = text[at : at + self.cols - cursor.x]
            line, end = self.lines[cursor.y], cursor.x + len(part)
            self._part(line, cursor.x)
            self._part(line, end)
            style = cursor.style
            line[cursor.x : end] = [(char, style) for char in part]
            at += len(part)
            self._advance(len(part))
            if cursor.wrap and 7 not in self.modes and at < len(text):
                at = len(text) - 1
                cursor.wrap, cursor.x = False, self.cols - 1

    def _part(self, line: list[Cell], x: int) -> None:
        """A wide letter whose second half is at `x` becomes blank."""
        if 0 < x < len(line) and line[x][0] == "":
            line[x - 1] = (" ", line[x - 1][1])
            line[x] = (" ", line[x][1])

    def _advance(self, width: int) -> None:
        cursor = self.cursor
        cursor.x += width
        if cursor.x >= self.cols:
            cursor.x, cursor.wrap = self.cols - 1, 7 in self.modes

    def _wrap(self) -> None:
        self.cursor.wrap = False
        if 7 in self.modes:
            self.cursor.x = 0
            self._index()
        else:
            self.cursor.x = max(0, self.cols - 2)

    def _combine(self, char: str) -> None:
        cursor = self.cursor
        line, x = self.lines[cursor.y], cursor.x if cursor.wrap else cursor.x - 1
        if x > 0 and line[x][0] == "":
            x -= 1
        if x >= 0 and line[x][0]:
            line[x] = (line[x][0] + char, line[x][1])

    def _index(self) -> None:
        if self.cursor.y == self._bottom:
            self._scroll(1)
        elif self.cursor.y < self.rows - 1:
            self.cursor.y += 1

    def _scroll(self, count: int, top: int | None = None) -> None:
        """Lines of the region (from `top` on) move up, or down when negative."""
        top = self._top if top is None else top
        size = self._bottom - top + 1
        count = max(-size, min(size, count))
        blank = [self._empty(self._back) for _ in range(abs(count))]
        region = self.lines[top : self._bottom + 1]
        self.lines[top : self._bottom + 1] = (
            [*region[count:], *blank] if count > 0 else [*blank, *region[: size + count]]
        )

    @property
    def _back(self) -> str:
        return self.cursor.colors[1]

    def _control(self, char: str) -> None:
        cursor = self.cursor
        if char == "\r":
            cursor.x, cursor.wrap = 0, False
        elif char in "\n\x0b\x0c":
            cursor.wrap = False
            if 20 in self._plain_modes:
                cursor.x = 0
            self._index()
        elif char == "\b":
            cursor.x, cursor.wrap = max(0, cursor.x - 1), False
        elif char == "\t":
            cursor.x = min((tab for tab in self._tabs if tab > cursor.x), default=self.cols - 1)
        elif char in "\x0e\x0f":
            cursor.shift = int(char == "\x0e")

    def _escape(self, char: str) -> None:
        cursor = self.cursor
        if char == "7":
            self._saved = cursor.copy()
        elif char == "8":
            self._restore()
        elif char == "c":
            self._start()
        elif char in "DE":
            cursor.wrap = False
            cursor.x = 0 if char == "E" else cursor.x
            self._index()
        elif char == "M":
            cursor.wrap = False
            if cursor.y == self._top:
                self._scroll(-1)
            else:
                cursor.y = max(0, cursor.y - 1)
        elif char == "H":
            self._tabs.add(cursor.x)
        elif char in "=>":
            self._keypad = char == "="

    def _restore(self) -> None:
        self.cursor = self._saved.copy() if self._saved is not None else _Cursor()
        self.cursor.y, self.cursor.x = min(self.cursor.y, self.rows - 1), min(self.cursor.x, self.cols - 1)

    # ------------------------------------------------------------ sequences

    def _sequence(self, mark: str, args: str, between: str, final: str) -> None:
        if mark == "?" and final in "hl":
            for number in _numbers(args):
                self._private(number, final == "h")
        elif mark == ">" and final == "u":
            self._keyboards = [*self._keyboards, args][-16:]
        elif mark == "<" and final == "u":
            del self._keyboards[max(0, len(self._keyboards) - (_numbers(args)[0] or 1)) :]
        elif mark == ">" and final == "m":
            self._other_keys = args
        elif between == " " and final == "q":
            self._shape = args
        elif between == "!" and final == "p":
            self.cursor = _Cursor()
            self.modes, self._plain_modes = set(_ON), set[int]()
            self._top, self._bottom = 0, self.rows - 1
        elif not mark and not between:
            if final == "m":
                self._look(args)
            elif final in "hl":
                change = self._plain_modes.update if final == "h" else self._plain_modes.difference_update
                change(_numbers(args))
            else:
                self._edit(final, _numbers(args))

    def _private(self, mode: int, on: bool) -> None:
        if mode in _ALTERNATE:
            self._alternate(on, mode == 1049)
        elif mode == 1048:
            self._escape("7" if on else "8")
        if mode == 6:
            self.cursor.origin = on
            self._go(0, 0)
        elif mode not in _NOT_KEPT:
            (self.modes.add if on else self.modes.discard)(mode)

    def _alternate(self, on: bool, saves: bool) -> None:
        if on and self._main is None:
            self._main = (self.lines, self.cursor.copy())
            self.lines = [self._empty() for _ in range(self.rows)]
        elif not on and self._main is not None:
            self.lines, cursor = self._main
            self._main = None
            if saves:
                self.cursor = cursor

    def _look(self, args: str) -> None:
        cursor = self.cursor
        words = args.split(";")
        at = 0
        while at < len(words):
            word = words[at]
            at += 1
            number = _number(word.partition(":")[0])
            if number in (38, 48):
                if ":" not in word:
                    size = {"5": 2, "2": 4}.get(words[at] if at < len(words) else "", 0)
                    word = ";".join([word, *words[at : at + size]])
                    at += size
                cursor.colors[number == 48] = word
            elif 30 <= number <= 37 or 90 <= number <= 97 or 40 <= number <= 47 or 100 <= number <= 107:
                cursor.colors[number // 10 in (4, 10)] = str(number)
            elif number in (39, 49):
                cursor.colors[number == 49] = ""
            elif number == 0:
                cursor.flags.clear()
                cursor.colors = ["", ""]
            elif number < 10:
                cursor.flags.add(number)
            else:
                cursor.flags -= {21: {1}, 22: {1, 2}, 23: {3}, 24: {4}, 25: {5, 6}, 27: {7}, 28: {8}, 29: {9}}.get(
                    number, set[int]()
                )
        cursor.style = ";".join([*(str(flag) for flag in sorted(cursor.flags)), *filter(None, cursor.colors)])

    def _edit(self, final: str, numbers: list[int]) -> None:
        cursor, first = self.cursor, numbers[0]
        count = max(1, first)
        if final == "r":
            top, bottom = max(1, first), (numbers[1] if len(numbers) > 1 else 0) or self.rows
            if top < bottom <= self.rows:
                self._top, self._bottom = top - 1, bottom - 1
                self._go(0, 0)
            return
        if final == "g":
            self._tabs = set[int]() if first == 3 else self._tabs - {cursor.x}
            return
        if final in "su":
            self._escape("7" if final == "s" else "8")
            return
        if final == "b":
            self._write(self._last * min(count, self.rows * self.cols))
            return
        if final in "nct":
            return
        cursor.wrap = False
        if final in "ABEFea":
            down = count if final in "BEe" else -count if final in "AF" else 0
            low = self._top if down < 0 and cursor.y >= self._top else 0
            high = self._bottom if down > 0 and cursor.y <= self._bottom else self.rows - 1
            cursor.y = max(low, min(high, cursor.y + down))
            cursor.x = 0 if final in "EF" else min(self.cols - 1, cursor.x + count) if final == "a" else cursor.x
        elif final in "CD":
            cursor.x = max(0, min(self.cols - 1, cursor.x + (count if final == "C" else -count)))
        elif final in "G`":
            cursor.x = min(self.cols, count) - 1
        elif final == "d":
            self._go(count - 1, cursor.x)
        elif final in "Hf":
            self._go(count - 1, max(1, numbers[1] if len(numbers) > 1 else 1) - 1)
        elif final in "JK":
            self._erase(final, first)
        elif final in "@PX":
            self._letters(final, count)
        elif final in "LM" and self._top <= cursor.y <= self._bottom:
            self._scroll(count if final == "M" else -count, cursor.y)
            cursor.x = 0
        elif final in "ST":
            self._scroll(count if final == "S" else -count)
        elif final == "I":
            for _ in range(count):
                self._control("\t")

    def _go(self, y: int, x: int) -> None:
        low, high = (self._top, self._bottom) if self.cursor.origin else (0, self.rows - 1)
        self.cursor.y, self.cursor.x = min(high, low + y), min(self.cols - 1, x)
        self.cursor.wrap = False

    def _erase(self, final: str, how: int) -> None:
        cursor = self.cursor
        y, x = cursor.y, cursor.x
        line = self.lines[y]
        if how == 0:
            line[x:] = [(" ", self._back)] * (self.cols - x)
        elif how == 1:
            line[: x + 1] = [(" ", self._back)] * (x + 1)
        elif how == 2:
            line[:] = self._empty(self._back)
        self._mend(line)
        if final == "J":
            for other in {0: range(y + 1, self.rows), 1: range(y), 2: range(self.rows)}.get(how, range(0)):
                self.lines[other] = self._empty(self._back)

    def _letters(self, final: str, count: int) -> None:
        line, x = self.lines[self.cursor.y], self.cursor.x
        count = min(count, self.cols - x)
        blank = [(" ", self._back)] * count
        if final == "@":
            line[x:x] = blank
            del line[self.cols :]
        elif final == "P":
            del line[x : x + count]
            line += blank
        else:
            line[x : x + count] = blank
        self._mend(line)

    def _mend(self, line: list[Cell]) -> None:
        """Halves of wide letters become blank."""
        if not self._wide:
            return
        for x, (char, style) in enumerate(line):
            behind = x + 1 < len(line) and line[x + 1][0] == ""
            if (char == "" and (not x or _width(line[x - 1][0][:1] or " ") != 2)) or (
                _width(char[:1] or " ") == 2 and not behind
            ):
                line[x] = (" ", style)

    # ------------------------------------------------------------ what it is for

    def resize(self, rows: int, cols: int) -> None:
        """As xterm does it: lines are cut or made longer; of too many the lowest go, those above the cursor last."""
        if self._main is not None:
            self._fit(self._main[0], self._main[1], rows, cols)
        self._fit(self.lines, self.cursor, rows, cols)
        self.rows, self.cols = rows, cols
        self._top, self._bottom = 0, rows - 1
        self._tabs |= set(range(8, cols, 8))

    def _fit(self, lines: list[list[Cell]], cursor: _Cursor, rows: int, cols: int) -> None:
        while len(lines) > rows:
            if cursor.y < len(lines) - 1:
                lines.pop()
            else:
                del lines[0]
                cursor.y -= 1
        for line in lines:
            line[cols:] = [_BLANK] * (cols - len(line))
            self._mend(line)
        while len(lines) < rows:
            lines.append([_BLANK] * cols)
        cursor.x, cursor.wrap = min(cursor.x, cols - 1), cursor.wrap and cols == self.cols

    def redraw(self) -> bytes:
        """What makes a terminal of this size show the same, and take the next output as this one would."""
        out = [RESET.decode()]
        if self._main is not None:
            lines, cursor = self._main
            out += [_drawn(lines), _placed(cursor), "\x1b[?1049h"]
        out.append(_drawn(self.lines))
        if self._saved is not None:
            out += [_placed(self._saved), "\x1b7"]
        if (self._top, self._bottom) != (0, self.rows - 1):
            out.append(f"\x1b[{self._top + 1};{self._bottom + 1}r")
        if self._tabs != set(range(8, self.cols, 8)):
            out.append("\x1b[3g" + "".join(f"\x1b[1;{tab + 1}H\x1bH" for tab in sorted(self._tabs)))
        out += [f"\x1b[?{mode}h" for mode in sorted(self.modes - {7, 25})]
        out += [f"\x1b[{mode}h" for mode in sorted(self._plain_modes & {4, 20})]
        out += ["\x1b="] if self._keypad else []
        out += [f"\x1b[>{flags}u" for flags in self._keyboards]
        out += [f"\x1b[>{self._other_keys}m"] if self._other_keys else []
        out += [f"\x1b[{self._shape} q"] if self._shape else []
        out += [f"\x1b]2;{self._title}\x07"] if self._title else []
        cursor = self.cursor
        out.append(_placed(cursor))
        if cursor.wrap:
            line = self.lines[cursor.y]
            x = cursor.x - (line[cursor.x][0] == "")
            out.append(f"\x1b[{cursor.y + 1};{x + 1}H\x1b[0;{line[x][1]}m{line[x][0]}\x1b[0;{cursor.style}m")
        if cursor.origin:
            out.append(f"\x1b[?6h\x1b[{cursor.y - self._top + 1};{cursor.x + 1}H")
        out += [f"\x1b{mark}{name}" for mark, name in zip("()", cursor.sets, strict=True) if name != "B"]
        out += ["\x0e"] if cursor.shift else []
        out += ["\x1b[?7l"] if 7 not in self.modes else []
        out += ["\x1b[?25l"] if 25 not in self.modes else []
        return "".join(out).encode("utf-8", "replace")


def _drawn(lines: list[list[Cell]]) -> str:
    out = ["\x1b[m\x1b[H\x1b[2J"]
    for y, line in enumerate(lines):
        length = len(line)
        while length and line[length - 1] == _BLANK:
            length -= 1
        if not length:
            continue
        out.append(f"\x1b[{y + 1};1H")
        style = ""
        for char, look in line[:length]:
            if look != style:
                out.append(f"\x1b[0;{look}m" if look else "\x1b[m")
                style = look
            out.append(char)
        if style:
            out.append("\x1b[m")
    return "".join(out)


def _placed(cursor: _Cursor) -> str:
    return f"\x1b[{cursor.y + 1};{cursor.x + 1}H\x1b[0;{cursor.style}m"


def _numbers(args: str) -> list[int]:
    return [_number(word.partition(":")[0]) for word in args.split(";")]


def _number(word: str) -> int:
    return min(int(word), 65535) if word.isdigit() and len(word) < 10 else 0


def _width(char: str) -> int:
    if char < "\u0300":
        return 1
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _may_go_on(source: str, at: int) -> bool:
    """Whether what begins at `at` is a sequence that has no end yet."""
    return source[at] == "\x1b" and re.fullmatch(
        r"\x1b(?:\[[<-?]?[0-9;:]*[ -/]*|\][^\x07\x1b]*\x1b?|[PX^_][^\x1b]*\x1b?|[ -/]*)", source[at:]
    ) is not None  # fmt: skip
