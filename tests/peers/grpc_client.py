"""A client that knows nothing of the contract but what the agent's reflection service tells: another gRPC
implementation than ours. Has the key KEY sign a digest, checks it, and prints the services and what it got.

    grpc_client.py SOCKET KEY
"""

import hashlib
import os
import sys

import grpc
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "omsign.v1.AgentService"


def main(socket: str, key: str) -> None:
    # gRPC's C core would send the socket's path as :authority, which Rust's HTTP/2 refuses (RFC 3986, 3.2).
    channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.default_authority", "localhost")])
    database = ProtoReflectionDescriptorDatabase(channel)
    for name in sorted(database.get_services()):
        print(name)
    service = DescriptorPool(database).FindServiceByName(SERVICE)

    def method(name: str):
        found = service.methods_by_name[name]
        request, response = GetMessageClass(found.input_type), GetMessageClass(found.output_type)
        call = channel.unary_stream if found.server_streaming else channel.unary_unary
        return request, call(f"/{SERVICE}/{name}", request.SerializeToString, response.FromString)

    request, list_keys = method("ListKeys")
    print("keys:", ", ".join(found.name for found in list_keys(request(), timeout=20).keys))
    digest = hashlib.sha256(b"a message").digest()
    request, sign = method("Sign")
    events = list(sign(request(key=key, request_id=os.urandom(16), digest=digest), timeout=20))
    signed = events[-1].signed
    public = serialization.load_der_public_key(signed.public_key)
    public.verify(signed.signature, digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    print("signed")
    try:
        list(sign(request(key=key, request_id=os.urandom(16), digest=b"short"), timeout=20))
    except grpc.RpcError as error:
        print(error.code().name)


main(*sys.argv[1:])
