"""A real map: nine lines of the London Underground where they run through the middle of the city, as facts: which
stations follow one another on a line.

As it ran in 2020. Bank and Monument are one station complex; the two stations called Edgware Road are two.
"""

from __future__ import annotations

from itertools import pairwise

LINES: dict[str, tuple[str, ...]] = {
    "Bakerloo": (
        "Paddington", "Edgware Road (Bakerloo)", "Marylebone", "Baker Street", "Regent's Park", "Oxford Circus",
        "Piccadilly Circus", "Charing Cross", "Embankment", "Waterloo", "Lambeth North", "Elephant & Castle",
    ),
    "Central": (
        "Notting Hill Gate", "Queensway", "Lancaster Gate", "Marble Arch", "Bond Street", "Oxford Circus",
        "Tottenham Court Road", "Holborn", "Chancery Lane", "St Paul's", "Bank", "Liverpool Street",
    ),
    "Circle": (
        "Edgware Road (Circle)", "Paddington", "Bayswater", "Notting Hill Gate", "High Street Kensington",
        "Gloucester Road", "South Kensington", "Sloane Square", "Victoria", "St James's Park", "Westminster",
        "Embankment", "Temple", "Blackfriars", "Mansion House", "Cannon Street", "Bank", "Tower Hill", "Aldgate",
        "Liverpool Street", "Moorgate", "Barbican", "Farringdon", "King's Cross St Pancras", "Euston Square",
        "Great Portland Street", "Baker Street", "Edgware Road (Circle)",
    ),
    "Jubilee": (
        "Baker Street", "Bond Street", "Green Park", "Westminster", "Waterloo", "Southwark", "London Bridge",
    ),
    "Northern, Bank": (
        "Euston", "King's Cross St Pancras", "Angel", "Old Street", "Moorgate", "Bank", "London Bridge", "Borough",
        "Elephant & Castle",
    ),
    "Northern, Charing Cross": (
        "Euston", "Warren Street", "Goodge Street", "Tottenham Court Road", "Leicester Square", "Charing Cross",
        "Embankment", "Waterloo",
    ),
    "Piccadilly": (
        "Gloucester Road", "South Kensington", "Knightsbridge", "Hyde Park Corner", "Green Park", "Piccadilly Circus",
        "Leicester Square", "Covent Garden", "Holborn", "Russell Square", "King's Cross St Pancras",
    ),
    "Victoria": (
        "Pimlico", "Victoria", "Green Park", "Oxford Circus", "Warren Street", "Euston", "King's Cross St Pancras",
    ),
    "Waterloo & City": ("Waterloo", "Bank"),
}  # fmt: skip

STATIONS: tuple[str, ...] = tuple(dict.fromkeys(station for line in LINES.values() for station in line))


def neighbours() -> list[list[int]]:
    """The stations that each station is one stop from, by number in `STATIONS`, ascending."""
    number = {station: index for index, station in enumerate(STATIONS)}
    found: list[set[int]] = [set() for _ in STATIONS]
    for line in LINES.values():
        for one, other in pairwise(line):
            found[number[one]].add(number[other])
            found[number[other]].add(number[one])
    return [sorted(near) for near in found]
