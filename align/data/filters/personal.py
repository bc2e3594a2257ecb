"""Find personal data: patterns and, where the number has one, its checksum."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection

from align.config.filters import PersonalData

_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def luhn(number: str) -> bool:
    """True if the last digit is the Luhn check digit of the others (ISO/IEC 7812)."""
    digits = [int(character) for character in number if character.isdigit()]
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and sum(doubled) % 10 == 0 and len(set(digits)) > 1


def iban(number: str) -> bool:
    """True if the check digits of an IBAN are right (ISO 13616: modulo 97 is 1)."""
    text = re.sub(r"\s", "", number).upper()
    return 15 <= len(text) <= 34 and int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def resident_id(number: str) -> bool:
    """True if the last character of a Chinese resident identity number is right (GB 11643)."""
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, number))
    return "10X98765432"[total % 11] == number[-1].upper()


def _public_address(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _ssn(text: str) -> bool:
    area, group, serial = text.split("-")
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


_EXAMPLE = re.compile(r"@(?:example|test|domain|email|company|yourdomain)\.", re.IGNORECASE)
_PATTERNS: dict[PersonalData, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (
        re.compile(r"\b[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b"),
        lambda text: not _EXAMPLE.search(text),
    ),
    "phone": (
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){2,3}"
            r"|\(?[2-9]\d{2}\)?[ .-]\d{3}[ .-]\d{4}|1[3-9]\d{9})(?![\w-])"
        ),
        lambda text: "555" not in re.sub(r"\D", "", text)[-10:-4],
    ),
    "credit_card": (re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])"), luhn),
    "iban": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), iban),
    "us_ssn": (re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"), _ssn),
    "cn_resident_id": (re.compile(r"(?<!\w)[1-9]\d{5}(?:19|20)\d{2}(?:0\d|1[0-2])[0-3]\d{4}[\dXx](?!\w)"), resident_id),
    "ip_address": (re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])"), _public_address),
}


def personal_data(text: str, kinds: Collection[PersonalData]) -> PersonalData | None:
    """The first kind of personal data that the text contains, if any.

    Numbers reserved for examples are not personal: telephone numbers with 555, and addresses at example domains.
    """
    for kind in kinds:
        pattern, valid = _PATTERNS[kind]
        if any(valid(found[0]) for found in pattern.finditer(text)):
            return kind
    return None
