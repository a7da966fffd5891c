"""Units at the end of an answer: what they measure, and how many of the smallest of them they are."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """dims: what it measures, as (base, power) pairs in order; factor: base units in one of it; count: a million, a dozen."""

    dims: tuple[tuple[str, int], ...]
    factor: Fraction
    count: int = 1


def _table(base: str, entries: str) -> dict[str, tuple[str, Fraction]]:
    return {name: (base, Fraction(size)) for size, names in (e.split("=") for e in entries.split(";")) for name in names.split(",")}


_UNITS: dict[str, tuple[str, Fraction]] = (
    _table("m", "1=m,meter,meters,metre,metres;1/100=cm,centimeter,centimeters,centimetre,centimetres;"
        "1/1000=mm,millimeter,millimeters,"
           "millimetre,millimetres;1000=km,kilometer,kilometers,kilometre,kilometres;1/10=dm,decimeter,decimeters;1/1000000=µm,micrometers;"
           "1/1000000000=nm,nanometers")
    | _table("ft", "1=ft,foot,feet;1/12=inch,inches;3=yd,yard,yards;5280=mi,mile,miles")
    | _table("g", "1=g,gram,grams;1000=kg,kilogram,kilograms,kilo,kilos;1/1000=mg,milligram,milligrams;1000000=tonne,tonnes")
    | _table("lb", "1=lb,lbs,pound,pounds;1/16=oz,ounce,ounces;2000=ton,tons")
    | _table("s", "1=s,sec,secs,second,seconds;60=min,mins,minute,minutes;3600=h,hr,hrs,hour,hours;86400=day,days;"
        "604800=week,weeks;"
             "1/1000=ms,millisecond,milliseconds")
    | _table("month", "1=month,months;12=year,years,yr,yrs")
    | _table("L", "1=L,l,liter,liters,litre,litres;1/1000=mL,ml,milliliter,milliliters,millilitre,millilitres")
    | _table("gal", "1=gallon,gallons,gal;1/4=quart,quarts;1/8=pint,pints;1/16=cup,cups")
    | _table("USD", "1=$,dollar,dollars,USD,usd,bucks;1/100=cent,cents,¢")
    | _table("EUR", "1=€,euro,euros,EUR") | _table("GBP", "1=£,GBP") | _table("JPY", "1=¥,yen,JPY")
    | _table("INR", "1=₹,rupee,rupees,INR")
    | _table("deg", "1=°,degree,degrees,deg") | _table("rad", "1=rad,radian,radians")
    | _table("°C", "1=°C,Celsius,celsius") | _table("°F", "1=°F,Fahrenheit,fahrenheit") | _table("K", "1=K,kelvin,kelvins")
    | _table("N", "1=N,newton,newtons;1000=kN") | _table("J", "1=J,joule,joules;1000=kJ") | _table("W", "1=W,watt,watts;1000=kW")
    | _table("V", "1=V,volt,volts") | _table("A", "1=A,ampere,amperes,amp,amps") | _table("Pa", "1=Pa,pascal,pascals;1000=kPa")
    | _table("Hz", "1=Hz,hertz;1000=kHz") | _table("ohm", "1=ohm,ohms,\\Omega") | _table("mol", "1=mol,mole,moles")
    | _table("cal", "1=cal,calories")
    | _table("B", "1=byte,bytes;1000=KB,kB;1000000=MB;1000000000=GB") | _table("bit", "1=bit,bits")
)  # fmt: skip
_UNITS["in"] = _UNITS["inch"]
_COMPOUND = {
    "mph": "mi/h",
    "kph": "km/h",
    "kmh": "km/h",
    "kmph": "km/h",
    "sqft": "ft^2",
    "cc": "cm^3",
    "rpm": "rev/min",
    "fps": "ft/s",
}
_COUNTED = frozenset((
    "unit units apple apples orange oranges book books people person persons student students child children boy boys girl "
    "girls man men woman women point points time times way ways item items marble marbles ball balls car cars egg eggs "
    "cookie cookies page pages piece pieces cat cats dog dogs coin coins card cards box boxes bag bags bottle bottles "
    "pencil pencils pen pens ticket tickets flower flowers tree trees side sides edge edges vertex vertices face faces "
    "diagonal diagonals triangle triangles square squares circle circles number numbers digit digits integer integers "
    "solution solutions root roots pair pairs group groups team teams game games worker workers animal animals bird birds "
    "fish chicken chickens cow cows horse horses sheep goat goats seat seats row rows column columns table tables chair "
    "chairs room rooms house houses bus buses train trains trip trips lap laps step steps slice slices pizza pizzas cake "
    "cakes candy candies toy toys sticker stickers stamp stamps stone stones tile tiles block blocks letter letters word "
    "words question questions problem problems vote votes player players member members passenger passengers customer "
    "customers friend friends guest guests rev revs revolution revolutions outcome outcomes permutation permutations "
    "combination combinations arrangement arrangements subset subsets element elements term terms factor factors divisor "
    "divisors move moves"
).split())  # fmt: skip
MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_TAIL = re.compile(r"^(.*(?:[\d)}\]!|]|\\pi|\\infty))(\s*)((?:\\Omega|[A-Za-z°€£¥$¢µ])[A-Za-z°€£¥$¢µ.^{}\d\s*/-]*)$", re.S)
_PIECE = re.compile(r"\s*(?:(per|/)|(\*)|(\\Omega|°[CF]?|[€£¥$¢]|[A-Za-zµ]+)\.?(?:\s*\^\s*\{?(-?\d)\}?)?)\s*")
_PREFIX = re.compile(r"^([-+]?)\s*([$€£¥₹])\s*(?=[-+\d.\\(])")
_SYMBOL = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])|\^")
_ADJECTIVES = frozenset("different distinct possible total more red blue green white black yellow whole US".split())
_ANGLE = re.compile(r"sin|cos|tan|sec|csc|cot")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_TAIL_LENGTH = 60


def split_unit(text: str) -> tuple[str, Unit | None]:
    """("5 cm^2") → ("5", square centimetres); without a unit that is known, the text as it came."""
    prefix = _PREFIX.match(text)
    sign_unit = None
    if prefix:
        sign_unit, text = read_unit(prefix[2]), prefix[1] + text[prefix.end() :]
    head, tail = text[:-_TAIL_LENGTH], text[-_TAIL_LENGTH:]
    match = _TAIL.match(tail)
    if match is None:
        return text, sign_unit
    if "°" in match[3] and _ANGLE.search(match[1]):  # the degrees of sin 30° are no unit of the sine
        return text, sign_unit
    lone = len(match[3].strip()) == 1 and match[3].strip().isalpha()
    if lone and (not match[2] or _SYMBOL.search(match[1].rsplit("=", 1)[-1])):
        return text, sign_unit
    unit = read_unit(match[3])
    if unit is None:
        return text, sign_unit
    value = head + match[1]
    if unit.count != 1:  # "5 million" is a number
        value = f"({value})*{unit.count}"
    if sign_unit is not None:
        return (text, None) if unit.dims else (value, sign_unit)
    return value, unit if unit.dims else None


def read_unit(text: str) -> Unit | None:
    """The unit that a text names: "km/h", "square feet", "m s^-1", "million dollars"; None where it is none."""
    dims: dict[str, int] = {}
    factor, count, position, sign, power_next, text = Fraction(1), 1, 0, 1, 1, text.strip()
    while position < len(text):
        match = _PIECE.match(text, position)
        if match is None:
            return None
        position = match.end()
        if match[1]:
            sign = -1
        elif match[3] and match[3].lower() in _POWERS and power_next == 1 and position < len(text):
            power_next = _POWERS[match[3].lower()]
        elif match[3] in _ADJECTIVES and position < len(text):
            continue
        elif match[3]:
            power, power_next = power_next * int(match[4] or 1), 1
            if match[3] in MULTIPLIERS and sign == 1:
                count *= MULTIPLIERS[match[3]]
            elif not _multiply(dims, match[3], sign * power):
                return None
            else:
                factor *= _size(match[3]) ** (sign * power)
    return Unit(tuple(sorted((base, power) for base, power in dims.items() if power)), factor, count) if power_next == 1 else None


def _size(name: str) -> Fraction:
    if name in _COMPOUND:
        compound = read_unit(_COMPOUND[name])
        return compound.factor if compound else Fraction(1)
    name = name.lower() if name not in _UNITS and len(name) > 3 else name
    return _UNITS[name][1] if name in _UNITS else Fraction(1)


def _multiply(dims: dict[str, int], name: str, power: int) -> bool:
    if name in _COMPOUND:
        compound = read_unit(_COMPOUND[name])
        for base, inner in compound.dims if compound else ():
            dims[base] = dims.get(base, 0) + inner * power
        return True
    name = name.lower() if name.lower() in _UNITS and len(name) > 3 else name
    base = _UNITS[name][0] if name in _UNITS else (name.rstrip("s") if name in _COUNTED else None)
    if base is None:
        return False
    dims[base] = dims.get(base, 0) + power
    return True
