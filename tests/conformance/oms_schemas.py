"""What the conformance suite needs of the specification's `oms-schemas` package, with the schemas beside this file."""

import base64
import json
from pathlib import Path

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

NAMES = ["bundle", "envelope", "statement", "predicate"]
SCHEMAS = {name: json.loads((Path(__file__).parent / f"{name}.schema.json").read_text()) for name in NAMES}
REGISTRY = Registry().with_resources(
    (schema["$id"], Resource(contents=schema, specification=DRAFT202012)) for schema in SCHEMAS.values()
)
MATERIAL = {"key": "publicKey", "certificate": "x509CertificateChain", "sigstore": "certificate"}


def decode_payload(bundle):
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


def validate_method_fields(bundle, method):
    assert MATERIAL[method] in bundle["verificationMaterial"], f"no {MATERIAL[method]}"


def validate_bundle(bundle_path, method=None, schema_version=None):
    bundle = json.loads(Path(bundle_path).read_text())
    statement = decode_payload(bundle)
    checked = [("bundle", bundle)]
    # The schemas describe v1.0; the suite also has a bundle of release 0.2.0.
    if statement["predicateType"] != "https://model_signing/Digests/v0.1":
        checked.append(("statement", statement))
    for name, value in checked:
        Draft202012Validator(SCHEMAS[name], registry=REGISTRY).validate(value)
    if method:
        validate_method_fields(bundle, method)
