"""Judges bundles with sigstore-python: TRUSTED_ROOT IDENTITY PROVIDER BUNDLE..., one line `accepted` or `refused: …` each."""

import sys

from sigstore.models import Bundle, TrustedRoot
from sigstore.verify import Verifier
from sigstore.verify.policy import Identity

root, identity, provider, *bundles = sys.argv[1:]
verifier = Verifier(trusted_root=TrustedRoot.from_file(root))
policy = Identity(identity=identity, issuer=provider)
for path in bundles:
    try:
        with open(path, "rb") as file:
            bundle = Bundle.from_json(file.read())
        verifier.verify_dsse(bundle, policy)
        print("accepted")
    except Exception as error:
        print("refused:", type(error).__name__, str(error).replace("\n", " ")[:200])
