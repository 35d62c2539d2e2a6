"""Command line of old model_signing releases, without the network.

Up to 1.0.1 every signing configuration first asks Sigstore for its trust root, even to sign with a key.
"""

import sys

import model_signing.signing
from model_signing._cli import main

model_signing.signing.Config.use_sigstore_signer = lambda self, **_: self
sys.argv[0] = "model_signing"
main()
