"""Fig. 8, left: where a photo was taken, told by numbers or by words."""

from __future__ import annotations

from collections.abc import Mapping

from gps_guidance.reproduce.outcome import Claim, Outcome, Score, Table, claim_above
from gps_guidance.reproduce.settings import City, Settings
from gps_guidance.reproduce.table1 import COLUMNS, method_scores, method_units
from gps_guidance.reproduce.work import Done, Unit, Work

TITLES = {"ours": "fine-tuned on GPS", "address-model": "fine-tuned on addresses",
          "text": "base model, text"}
COMPARABLE = 0.1  # CLIP scores that differ by less than this part are "comparable"


def _cities(settings: Settings) -> list[City]:
    return [city for city in settings.cities if city.address_model is not None]


def units(settings: Settings) -> list[Unit]:
    return [unit for city in _cities(settings)
            for unit in method_units(city, TITLES, settings.seeds)]


def outcome(settings: Settings, work: Work, done: Mapping[str, Done]) -> Outcome:
    cities = _cities(settings)
    if not cities:
        return Outcome("Ablation: GPS or address", notes=["No city has an address_model."])
    rows = {method: method_scores(cities, settings.seeds, method, done) for method in TITLES}
    table = Table("ablation-geo", {key: title for key, title in COLUMNS.items()
                                   if any(key in row for row in rows.values())}, TITLES, rows)
    sheets = [(work.at(unit) / "sheet.png", f"{TITLES[method]}, seed {settings.seeds[0]}")
              for method in TITLES
              for unit in method_units(cities[0], [method], settings.seeds[:1])]
    notes = ["The paper shows this as bars, without numbers."]
    if any(city.dataset is None for city in cities):
        notes.append("In Miniatown an address names the place, and the place decides how it looks: "
                     "words tell a model all that can be seen, which in a real city they do not.")
    return Outcome("Ablation: GPS or address (Fig. 8, left)", table, sheets, claims_of(rows), notes)


def claims_of(rows: Mapping[str, Mapping[str, Score]]) -> list[Claim]:
    ours, words = rows["ours"]["clip"], rows["address-model"]["clip"]
    return [
        claim_above("GPS has a higher GPS score than addresses.", "gps", rows, "ours",
                    ["address-model"]),
        Claim("Their CLIP scores are comparable.",
              abs(ours.mean - words.mean) < COMPARABLE * max(ours.mean, words.mean),
              f"{ours} and {words}"),
    ]
