"""When a pipeline ticks: what a user writes, and the same for cron, for systemd and as a time to come.

Enters: `02:30`, `hourly`, or the five fields of a crontab. Leaves: a `Schedule`. Always holds: what cannot be understood
is refused before anything is installed. Times are local ones, as cron and systemd have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

_NAMED = {"hourly": "0 * * * *", "daily": "0 2 * * *", "weekly": "0 2 * * sun"}
"""Nightly and weekly work is done at two o'clock."""

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")

_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, 12), ("day of the week", 0, 7))

_YEARS_AHEAD = 8
"""The 29th of February comes again within so many years."""


class ScheduleError(ValueError):
    """A time that cannot be understood; the message says what can."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Five fields, as a crontab has them."""

    cron: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Understand what a user wrote.

        Raises:
            ScheduleError: it is none of the known forms, or never comes.
        """
        words = text.strip().lower()
        if match := re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", words):
            words = f"{int(match[2])} {int(match[1])} * * *"
        schedule = cls(" ".join(_NAMED.get(words, words).split()))
        if len(schedule.cron.split()) != len(_FIELDS):
            raise ScheduleError(
                f"--at {text!r}: not understood; write a time such as 02:30, or {', '.join(_NAMED)}, or five fields as in a "
                "crontab: '*/10 * * * *'"
            )
        schedule.next_after(datetime.now())
        return schedule

    @property
    def _allowed(self) -> list[set[int]]:
        """What each field allows; Sunday is 0."""
        sets = [_values(field, *known) for field, known in zip(self.cron.split(), _FIELDS, strict=True)]
        sets[4] = {day % 7 for day in sets[4]}
        return sets

    def next_after(self, moment: datetime) -> datetime:
        """The first time after a moment.

        Raises:
            ScheduleError: there is none, as on the 30th of February.
        """
        minutes, hours, *_ = self._allowed
        day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        for _ in range(366 * _YEARS_AHEAD):
            if self._on(day):
                for hour in sorted(hours):
                    for minute in sorted(minutes):
                        if (time := day.replace(hour=hour, minute=minute)) > moment:
                            return time
            day += timedelta(days=1)
        raise ScheduleError(f"--at {self.cron!r}: no such day comes")

    def _on(self, day: datetime) -> bool:
        _, _, dates, months, weekdays = self._allowed
        fields = self.cron.split()
        date, weekday = day.day in dates, day.isoweekday() % 7 in weekdays
        # Where both are given, cron takes either.
        either = (date or weekday) if fields[2] != "*" and fields[4] != "*" else (date and weekday)
        return day.month in months and either

    @property
    def on_calendar(self) -> list[str]:
        """The same for systemd; two lines where cron would take either of two days."""
        minutes, hours, dates, months, weekdays = self._allowed
        fields = self.cron.split()

        def some(values: set[int], index: int) -> str:
            return "*" if fields[index] == "*" else ",".join(f"{v:02d}" for v in sorted(values))

        clock = f"{some(hours, 1)}:{some(minutes, 0)}:00"
        days = ",".join(_DAYS[day].capitalize() for day in sorted(weekdays))
        month = some(months, 3)
        if fields[4] == "*":
            return [f"*-{month}-{some(dates, 2)} {clock}"]
        by_weekday = f"{days} *-{month}-* {clock}"
        return [by_weekday] if fields[2] == "*" else [f"*-{month}-{some(dates, 2)} {clock}", by_weekday]

    def __str__(self) -> str:
        return self.cron


def _values(field: str, name: str, low: int, high: int) -> set[int]:
    return {value for part in field.split(",") for value in _part(part, field, name, low, high)}


def _part(part: str, field: str, name: str, low: int, high: int) -> Iterator[int]:
    span, _, step = part.partition("/")
    first, dash, last = span.partition("-")
    try:
        start, stop = (low, high) if span == "*" else (_number(first, name), _number(last if dash else first, name))
        every = int(step) if step else 1
        if step and not dash and span != "*":
            stop = high
    except ValueError:
        start = stop = every = -1
    if not (low <= start <= stop <= high and every >= 1):
        raise ScheduleError(f"--at: {field!r} is no {name}; known are {low} to {high}, as in 5, 1-5, */10 or 0,30")
    yield from range(start, stop + 1, every)


def _number(text: str, name: str) -> int:
    names = _DAYS if name == "day of the week" else ("", *_MONTHS) if name == "month" else ()
    return names.index(text) if text in names else int(text)
