"""Licences and hub ids as the hub's model cards want them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from mmcompress.report.schema_data import UNKNOWN, Origin

_LISTED = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 gemma unknown other
"""
HUB_LICENCES = frozenset(_LISTED.split())
"""What ``license`` in a card's header may be: https://huggingface.co/docs/hub/repositories-licenses."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id."""
    return _HUB_ID.fullmatch(name) is not None


def hub_id_of(url: str, kind: Literal["model", "dataset"]) -> str | None:
    """The hub id that a URL of the hub names, else None."""
    found = re.fullmatch(r"(?:https?://)?(?:huggingface\.co|hf\.co)/(datasets/)?([\w.-]+/[\w.-]+)/?", url.strip())
    return found[2] if found is not None and bool(found[1]) == (kind == "dataset") else None


def card_licence(origins: Sequence[Origin]) -> dict[str, Any]:
    """The card's keys for the licence: that of the model whose weights the compressed one continues.

    A licence that the hub has no identifier for is ``other`` with its name; what is unknown is said to be so.
    """
    model = next((o for role in ("student", "model") for o in reversed(origins) if o.role == role), None)
    if model is None or model.license == UNKNOWN:
        return {"license": UNKNOWN}
    name = model.license.lower()
    if name in HUB_LICENCES:
        found: dict[str, Any] = {"license": name}
    else:
        found = {"license": "other", "license_name": re.sub(r"[^a-z0-9.+-]+", "-", name).strip("-") or "other"}
    return found | ({"license_link": model.license_link} if model.license_link else {})


def card_datasets(origins: Sequence[Origin]) -> list[str]:
    """The hub ids of the data that weights were trained or calibrated on; data of one's own has none."""
    used = [o.hub_id for o in origins if o.role in ("train", "calibration") and o.hub_id and is_hub_id(o.hub_id)]
    return list(dict.fromkeys(used))


def licence_words(origins: Sequence[Origin]) -> str:
    """A sentence for the model card."""
    model = next((o for role in ("student", "model") for o in reversed(origins) if o.role == role), None)
    rest = "look at those of the data, and of every model below, before you share this one."
    if model is None or model.license == UNKNOWN:
        return f"unknown: neither the recipe nor a card says what the base model's is. Find it out, and {rest}"
    by = {"recipe": "the recipe", "card": "its card", "mmcompress": "mmcompress"}.get(model.license_from, model.license_from)
    return f"that of the base model, {model.license} (as {by} says); {rest}"
