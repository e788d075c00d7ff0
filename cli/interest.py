"""The interest file of a device: what it is to hold of what was written elsewhere, and how much.

    wants:                                      # in the order of their weight
      - {tenant: grid, entities: ["subnet:7"], hops: 2}
      - {tenant: grid, types: [weather], regions: [north]}
    most_entities: 50000
    most_bytes: 67108864

The fields are those of `mnemesh.messages.Interest` and `Want`.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from mnemesh import wire
from mnemesh.errors import BadRequest, MnemeshError
from mnemesh.ids import check_name, to_token
from mnemesh.messages import Interest


def read_interest(path: Path) -> Interest:
    """What a YAML or JSON file says. Raises `BadRequest` that says what cannot be."""
    try:
        interest = wire.convert(yaml.safe_load(path.read_text()) or {}, Interest)
        for number, want in enumerate(interest.wants, 1):
            check_name("tenant", want.tenant)
            for entity_id in want.entities:
                to_token(entity_id)
            if want.hops and not want.entities:
                raise BadRequest(f"want {number} has hops, but no entities that they are counted from")
    except OSError as error:
        raise BadRequest(f"cannot read the interest file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, MnemeshError) as error:
        raise BadRequest(f"{path} is no interest of a device: {error}") from error
    return interest
