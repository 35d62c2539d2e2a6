"""Command line of the reference, release 1.1.1, with its pkcs11-certificate method made to work.

That method forgets two things that its certificate method does: base64 around each certificate, and an empty
list of log entries, without which its own bundle type refuses the bundle. Its repository has both since.
"""

import base64
import sys
import types

from model_signing._cli import main
from model_signing._signing import sign_pkcs11


def certificate(raw_bytes):
    return original_common.X509Certificate(raw_bytes=base64.b64encode(raw_bytes))


def material(**fields):
    return original_bundle.VerificationMaterial(**{"tlog_entries": [], **fields})


original_common, original_bundle = sign_pkcs11.common_pb, sign_pkcs11.bundle_pb
sign_pkcs11.common_pb = types.SimpleNamespace(**{**vars(original_common), "X509Certificate": certificate})
sign_pkcs11.bundle_pb = types.SimpleNamespace(**{**vars(original_bundle), "VerificationMaterial": material})
sys.argv[0] = "model_signing"
main()
